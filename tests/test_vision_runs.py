"""The image experiment end to end on tiny models and images: pixels, bases, results, exact resume, and errors."""

import io
import json
import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file
from test_processes import start as start_processes

import lorajax as lj
from experiments import vision
from experiments.pixels import MEAN, STD, augmented, prepared
from lorajax import build, config, data, start
from lorajax.data import ImageBatches, Images
from lorajax.io.hf import save_checkpoint
from lorajax.models import ResNet, ResNetConfig, ViT, ViTConfig, params_to_hf
from lorajax.shard.mesh import MeshError
from lorajax.shard.placement import LOCAL
from lorajax.train.run import Run

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: vision)")
CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
METHODS = sorted({path.stem for path in Path("configs").glob("*.py")} - {"__init__", "base", "neftune"})
METHODS = [name for name in METHODS if config.load(f"configs/{name}.py").get("study") == "glue"]


# --- pixels ---


def test_images_are_scaled_and_resized_as_pillow_does():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    scaled = ((pixels / 255 - MEAN) / STD).astype(np.float32)
    np.testing.assert_allclose(prepared(jnp.asarray(pixels), 6), scaled, atol=1e-5)
    planes = [[Image.fromarray(x[:, :, i], "F").resize((14, 14), Image.Resampling.BICUBIC) for i in range(3)]
              for x in scaled]  # fmt: skip
    want = np.stack([np.stack([np.asarray(plane) for plane in row], -1) for row in planes])
    np.testing.assert_allclose(prepared(jnp.asarray(pixels), 14), want, atol=1e-4)


def test_augmentation_mirrors_and_shifts_and_is_a_function_of_the_key():
    image = np.random.default_rng(0).integers(1, 256, (5, 6, 3), dtype=np.uint8)
    wide = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    whole = {}
    for flip in (False, True):
        for i in range(5):
            for j in range(5):
                cut = (np.pad(image[:, ::-1], ((2, 2), (2, 2), (0, 0))) if flip else wide)[i : i + 5, j : j + 6]
                whole[cut.tobytes()] = (flip, i, j)
    batch = jnp.asarray(np.stack([image] * 400))
    made = np.asarray(augmented(batch, jax.random.key(0), 2, True))
    seen = [whole[x.tobytes()] for x in made]  # KeyError: something else than a mirrored, shifted image
    assert len(set(seen)) == 50
    assert 150 < sum(flip for flip, _, _ in seen) < 250
    np.testing.assert_array_equal(made, augmented(batch, jax.random.key(0), 2, True))
    assert (made != np.asarray(augmented(batch, jax.random.key(1), 2, True))).any()
    np.testing.assert_array_equal(augmented(batch[:3], jax.random.key(0), 0, False), batch[:3])


# --- runs ---


def folder_of_images(folder: Path, count: int = 60) -> Path:
    """CIFAR-10's layout; the class is the hue of an 8 x 8 image of noise."""
    rng, folder = np.random.default_rng(0), folder / "cifar10"
    folder.mkdir(parents=True)
    hues = rng.uniform(40, 215, (10, 3))
    for split in ("train", "test"):
        labels = np.arange(count) % 10
        cells = []
        for label in labels:
            file = io.BytesIO()
            pixels = np.clip(hues[label] + rng.normal(0, 12, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(file, "PNG")
            cells.append({"bytes": file.getvalue(), "path": "x.png"})
        pq.write_table(pa.table({"img": cells, "label": pa.array(labels, pa.int64())}), folder / f"{split}.parquet")
    return folder.parent


def vit_folder(folder: Path) -> Path:
    settings = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 24, "image_size": 8, "patch_size": 4, "hidden_act": "gelu",
                "id2label": {"0": "a", "1": "b", "2": "c"}}  # fmt: skip
    model = ViTConfig.from_hf(settings, initializer_range=0.3)
    shapes, rng = jax.eval_shape(ViT(model).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))), np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), shapes)
    return save_checkpoint(folder, settings, params_to_hf(model, variables))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return vit_folder(root / "vit"), folder_of_images(root / "data"), root / "runs"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Programs, small ones too, are compiled once for all tests here; nothing is left in the user's cache."""
    before = {key: getattr(jax.config, key) for key in CACHE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "compile_cache", lambda: None)
        jax.config.update(CACHE[0], str(tmp_path_factory.mktemp("cache")))
        jax.config.update(CACHE[1], 0.0)
        yield
        for key, value in before.items():
            jax.config.update(key, value)
        compilation_cache.reset_cache()


def words(files, workdir, name, arg="", *more):
    return [
        f"--config=configs/{name}.py{arg}", f"--config.data={files[1]}", f"--workdir={workdir}", "--config.size=8",
        "--config.batch=10", "--config.log_every=1", "--config.pad=1", "--config.study=tiny", *more,
    ]  # fmt: skip


def resnet(files, workdir, arg=":rank=2", *more):
    base = {"sizes": "6", "depths": "1", "size": 8, "batch": 10, "epochs": 20, "lr": 2e-2, "pad": 0}
    flags = [f"--config.base.{key}={value}" for key, value in base.items()]
    return words(files, workdir, "resnet", arg, *flags, *more)


def folder(workdir):
    (found,) = Path(workdir).glob("tiny/*/seed=*")
    return found


def test_a_resnet_is_made_once_and_adapted_with_its_statistics_as_they_are(files, capsys):
    runs = files[2]
    vision.main(resnet(files, runs, ":rank=2", "--config.epochs=8", "--config.lr=2e-2", "--config.head_lr=2e-2"))
    summary = json.loads((folder(runs) / "summary.json").read_text())
    assert set(summary["baselines"]) == {"majority class", "linear probe", "20 nearest images"}
    assert summary["baselines"]["majority class"] == {"accuracy": 0.2}
    assert summary["scores"]["accuracy"] > 0.7
    assert summary["steps"] == 24
    (base,) = (runs / "bases").iterdir()
    written = json.loads((base / "config.json").read_text())
    assert written["id2label"] == {str(i): x for i, x in enumerate(("airplane", "automobile", "bird", "cat", "deer"))}
    assert written["lorajax_base"]["accuracy"] > 0.5
    tensors = load_file(base / "model.safetensors")
    assert np.abs(tensors["resnet.embedder.embedder.normalization.running_mean"]).max() > 0.01

    record = json.loads((folder(runs) / "adapter" / "lorajax_adapter.json").read_text())
    assert record["peft"] is True
    adapted = {path for path, site in record["sites"].items() if site["variant"] == "lora"}
    assert adapted == {path for path in record["sites"] if path.endswith("conv/kernel")}
    assert {path for path in record["sites"] if path not in adapted} == {
        "params/classifier/kernel", "params/classifier/bias"}  # fmt: skip
    saved = load_file(folder(runs) / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.resnet.embedder.embedder.convolution.lora_A.weight"].shape == (2, 3, 7, 7)

    before = (base / "model.safetensors").stat().st_mtime_ns
    vision.main(resnet(files, runs, ":rank=2", "--config.epochs=8", "--config.lr=2e-2", "--config.head_lr=2e-2"))
    assert "finished already" in capsys.readouterr().out
    assert (base / "model.safetensors").stat().st_mtime_ns == before


def test_a_method_that_fits_no_convolution_is_refused_before_the_base_is_made(files, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "resnet", None)  # not reached
    with pytest.raises(lj.RuleError, match="matches no path"):
        vision.main(resnet(files, tmp_path, ":variant=ia3"))
    c = config.parse(resnet(files, tmp_path, ":rank=2"), workdir="").config
    model = vision.unmade(c, data.IMAGES["cifar10-second"])
    assert set(model.fresh) == {"params/classifier/kernel", "params/classifier/bias"}


def test_a_vision_transformer_resumes_bit_for_bit(files, tmp_path, monkeypatch, capsys):
    args = (f":model={files[0]},rank=2", "--config.probe=false", "--config.epochs=1", "--config.variant.dropout=0.1")
    vision.main(words(files, tmp_path / "whole", "vit", *args))
    log = Run.log

    def terminated(self, step, values, *, prefix=""):
        log(self, step, values, prefix=prefix)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", terminated)
    with pytest.raises(SystemExit) as left:
        vision.main(words(files, tmp_path / "cut", "vit", *args))
    assert left.value.code == 75
    assert "SIGTERM: saved at step 4 of 6" in capsys.readouterr().out
    monkeypatch.setattr(Run, "log", log)
    vision.main(words(files, tmp_path / "cut", "vit", *args))
    one, two = (folder(tmp_path / name) for name in ("whole", "cut"))
    for name in ["metrics.jsonl", *[f"adapter/{file.name}" for file in (one / "adapter").iterdir()]]:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def on_meshes(one, *others):
    """Losses to 1e-5, accuracies and steps exactly."""
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, *others)]
    assert all(run.parent.name == one.parent.name for run in others)
    for rows in zip(*lines, strict=True):
        for row in rows[1:]:
            assert row == pytest.approx(rows[0], rel=1e-5)
            assert "eval/accuracy" not in row or row == rows[0]


def test_a_vision_transformer_on_all_axes_at_once(files, tmp_path, capsys):
    args = (f":model={files[0]},rank=2", "--config.probe=false", "--config.epochs=1", "--config.batch=8",
            "--config.eval_batch=20", "--config.accumulate=2")  # fmt: skip
    vision.main(words(files, tmp_path / "one", "vit", *args))
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    vision.main(words(files, tmp_path / "spread", "vit", *args, *mesh))
    assert re.search(r"attention/query/kernel +16,16 +fsdp, tensor +8,8 +1", capsys.readouterr().out)
    on_meshes(folder(tmp_path / "one"), folder(tmp_path / "spread"))
    with pytest.raises(MeshError, match="a batch of 20 rows does not divide among data 8"):
        vision.main(words(files, tmp_path, "vit", *args[:-1], "--config.mesh.data=8"))


@pytest.mark.slow
def test_a_resnet_on_several_devices_and_processes(files, tmp_path):
    """Its convolutions are replicated. Process 0 makes the base, the probes are those of one device."""
    args = (":rank=2", "--config.epochs=1", "--config.batch=8", "--config.eval_batch=20", "--config.mesh.data=-1")
    for name, count, devices in (("one", 1, 1), ("two", 1, 2), ("apart", 2, 1)):
        codes, outs = start_processes(count, *resnet(files, tmp_path / name, *args), devices=devices,
                                      program=("-m", "experiments.vision"))  # fmt: skip
        assert codes == [0] * count, outs
    one, *others = (folder(tmp_path / name) for name in ("one", "two", "apart"))
    on_meshes(one, *others)
    told = [json.loads((run / "summary.json").read_text())["baselines"] for run in (one, *others)]
    assert told[0] == told[1] == told[2]


def test_a_step_that_is_not_finite_names_step_and_site(files, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((files[0] / "config.json").read_bytes())
    tensors = load_file(files[0] / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("intermediate.dense.weight"))
    tensors[name][3, 5] = np.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match=r"step 1 is not finite.*params/layer_0/ffn/up/kernel"):
        vision.main(words(files, tmp_path / "runs", "vit", f":model={model},rank=2"))


# --- methods ---


def test_a_start_that_reads_inputs_reads_no_empty_rows(files):
    """EVA's A is the same, but for signs, from a batch of six images and from them with two empty rows."""
    flags = ("--config.flip=false", "--config.calibrate.redistribute=false")
    argv = words(files, "", "vit", f":model={files[0]},variant=eva,rank=2", *flags, "--config.pad=0")
    c = config.parse(argv, workdir="").config
    found = vision.load_data(c)
    model = vision.load_model(c, found.task, jax.random.key(0), "")
    adapt = vision.plan(c, model, jnp.zeros((2, 8, 8, 3)))
    loss = vision.make_loss(lj.lift(model.net.apply), found.task, c)
    six = Images(found.splits["train"].pixels[:6], found.splits["train"].labels[:6])

    def started(rows):
        batches = ImageBatches(six, rows, shuffle=False)
        return start.make(c, adapt, model, loss, batches, jax.random.key(0), vision.real(c, model))[1]

    whole, padded = started(6), started(8)
    for path in [path for path, x in whole.items() if hasattr(x, "A")]:
        np.testing.assert_allclose(jnp.abs(whole[path].A), jnp.abs(padded[path].A), atol=1e-4)
    assert vision.real(c, model._replace(net=ResNet(ResNetConfig()))) is None  # a convolution's inputs are not read


WORKS = set("adalora bitfit delora dora dylora full hira hybrid kasa layernorm loha lokr lora lora_fa lora_plus "
            "lora_xs mica miss pissa randlora relora share_lora shira sora sparse vera".split())  # fmt: skip
REFUSED = {"ia3": "matches no path", "vb_lora": "does not divide", "gralora": "k=2 does not divide the 147 inputs",
           "hydralora": "routes tokens that a matmul reads", "oft": "OFT rotates the inputs of matmuls"}  # fmt: skip


@pytest.fixture(scope="module")
def small():
    """A ResNet as `load_model` returns it."""
    net = ResNet(ResNetConfig(stem_size=16, sizes=(16, 12), depths=(1, 1), kind="basic", num_labels=5))
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    variables = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    fresh = ("params/classifier/kernel", "params/classifier/bias")
    return build.Model(net, variables, fresh, Path("."), "", LOCAL)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_adapts_convolutions_or_says_why_not(small, name):
    """Rules, arrays, optimizer and controller of each method's own config; running statistics are nobody's."""
    own = config.load(f"configs/{name}.py")
    c = config.load(f"configs/resnet.py:variant={name}" + (",rank=2" if "rank" in own.args else ""))
    try:
        adapt = vision.plan(c, small, jnp.zeros((1, 8, 8, 3)))
    except lj.RuleError as error:
        assert name not in WORKS and REFUSED.get(name, "") in str(error), error
        return
    assert name not in REFUSED
    assert not [path for path in adapt.plan if path.startswith("batch_stats")]
    assert set(small.fresh) <= set(adapt.plan)
    assert (set(small.fresh) == set(adapt.plan)) == (name == "head")
    build.optimizer(c, adapt, small, 100)
    build.controller(c, adapt, 100)
    if not start.reads_data(c, adapt):
        jax.eval_shape(adapt.init, jax.random.key(0), small.variables)


def test_the_settings_of_a_method_are_its_own_configs():
    for name in ("adalora", "pissa", "full"):
        own, c = config.load(f"configs/{name}.py"), config.load(f"configs/vit.py:variant={name}")
        assert (c.variant, c.controller, c.optimizer) == (own.variant, own.controller, own.optimizer)
        assert c.lr == pytest.approx(config.load("configs/vit.py").lr * own.lr / config.load("configs/lora.py").lr)
        assert c.head_lr / c.lr == pytest.approx(own.head_lr / own.lr)
    for arg, said in (("variant=neftune", "'neftune' adds noise to word embeddings: leave it out"),
                      ("variant=bitfit,rank=3", "'bitfit' has no rank: leave it out"),
                      ("variant=doar", "unknown variant 'doar': did you mean 'dora'")):  # fmt: skip
        with pytest.raises(config.ConfigError, match=said):
            config.load(f"configs/vit.py:{arg}")
