"""What the backward pass computes again: the same numbers by every policy, what each keeps, and which one fits."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_glue import files, folder, own_cache, rows, words  # noqa: F401
from test_vision_runs import folder_of_images, vit_folder

import lorajax as lj
from experiments import glue, lm, members, vision
from lorajax import config
from lorajax.core.liveness import fullest
from lorajax.core.summary import activations
from lorajax.models import GPT2, Bert, BertConfig, GPT2Config, Llama, LlamaConfig, ResNet, ResNetConfig, ViT, ViTConfig
from lorajax.models.fused_attention import fused_attention
from lorajax.models.settings import keeps_attention, keeps_products
from lorajax.train import remat as dial
from lorajax.train.remat import POLICIES, TooLarge, fitting

IDS = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
WIDE, FFN, RANK = 32, 48, 4
LLAMA = LlamaConfig(vocab_size=64, hidden_size=WIDE, intermediate_size=FFN, num_layers=2, num_heads=4, num_kv_heads=4,
                    head_dim=8, tie_embeddings=False)  # fmt: skip
RESNET = ResNetConfig(stem_size=8, sizes=(8,), depths=(2,), kind="basic", num_labels=3)
MODELS = {
    "llama": (Llama(LLAMA), IDS),
    "llama_scanned": (Llama(dataclasses.replace(LLAMA, scan_layers=True)), IDS),
    "gpt2": (GPT2(GPT2Config(vocab_size=64, hidden_size=WIDE, num_layers=2, num_heads=4, max_positions=16)), IDS),
    "bert": (Bert(BertConfig(vocab_size=64, hidden_size=WIDE, num_layers=2, num_heads=4, intermediate_size=FFN,
                             max_positions=16)), IDS),
    "vit": (ViT(ViTConfig(hidden_size=WIDE, num_layers=2, num_heads=4, intermediate_size=FFN, image_size=8,
                          patch_size=4)), jnp.ones((2, 8, 8, 3))),
    "resnet": (ResNet(RESNET), jnp.ones((2, 16, 16, 3))),
}  # fmt: skip


def adapted(net, x, remat):
    """(value and gradient of a loss, its arguments, the adapt) with LoRA under the policy."""
    net = net.clone(config=dataclasses.replace(net.config, remat=remat))
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    adapt = lj.adapt(lj.sites(net.apply, params, x), [("params/(layer|stage).*kernel", lj.LoRA(rank=RANK))])
    run = lj.lift(net.apply, strict=True)
    return jax.value_and_grad(lambda t, frozen: jnp.square(run(adapt.bind(t, frozen), x)).mean()), adapt


@pytest.mark.parametrize("name", MODELS)
def test_every_policy_keeps_less_than_the_one_before(name):
    net, x = MODELS[name]

    def needs(layers, remat):
        count = {"depths": (layers,)} if name == "resnet" else {"num_layers": layers}
        deep = net.clone(config=dataclasses.replace(net.config, **count))
        return activations(adapted(deep, x, remat)[1])

    kept = [needs(3, remat) - needs(2, remat) for remat in POLICIES]  # of a layer, without what is worked on
    assert kept[0] > 1.2 * kept[1] > 1.2 * 1.2 * kept[2]


@pytest.mark.parametrize("name", ["llama_scanned", "resnet"])
def test_losses_and_gradients_are_the_same(name):
    net, x = MODELS[name]
    params = net.init(jax.random.key(0), x)
    found = []
    for remat in POLICIES:
        fn, adapt = adapted(net, x, remat)
        trainable, frozen = adapt.init(jax.random.key(1), params)
        trainable = jax.tree.map(lambda t: t + 0.1, trainable)
        found.append(jax.jit(fn)(trainable, frozen))
    for other in found[1:]:
        jax.tree.map(lambda want, have: np.testing.assert_allclose(have, want, rtol=2e-4, atol=1e-6), found[0], other)


@pytest.mark.parametrize("scanned", [False, True])
def test_attention_keeps_one_array_for_each_product_and_no_probabilities(scanned):
    """Of a layer: its input, q, k, v, what the attention adds, gate, up, and x A of seven matrices; not x W beside
    x W + x A B, which a policy that keeps dots alone does."""

    def kept(layers, remat):
        many = Llama(dataclasses.replace(LLAMA, num_layers=layers, scan_layers=scanned))
        return activations(adapted(many, IDS, remat)[1])

    one = IDS.size * (5 * WIDE + 2 * FFN + 7 * RANK) * 4
    assert kept(4, "attention") - kept(3, "attention") == one
    assert kept(4, "dots_with_no_batch_dims_saveable") - kept(3, "dots_with_no_batch_dims_saveable") > 1.7 * one


@pytest.fixture
def cudnn(monkeypatch):
    """JAX's cuDNN attention, to be traced: there is no GPU here."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    for check in ("check_cudnn_version", "check_compute_capability"):
        if hasattr(cudnn, check):
            monkeypatch.setattr(cudnn, check, lambda *_: 99999)
    return cudnn


def test_attention_names_the_fused_kernel(cudnn):
    """cuDNN's forward pass is run once, by a policy that keeps dots alone twice."""
    q = jnp.ones((1, 64, 2, 64), jnp.bfloat16)

    def runs(policy):
        def layer(q):
            return jnp.sin(cudnn.dot_product_attention(jnp.sin(q), q, q).astype(jnp.float32)).sum()

        with jax.numpy_dtype_promotion("standard"):
            jaxpr = jax.make_jaxpr(jax.grad(jax.checkpoint(layer, policy=policy)))(q)
        return str(jaxpr).count("dot_product_attention_fwd_wrapper[")

    assert runs(keeps_products) == runs(keeps_attention) == 1
    assert runs(None) == 2
    assert runs(jax.checkpoint_policies.dots_with_no_batch_dims_saveable) == 2


@pytest.mark.parametrize("remat", POLICIES)
def test_the_planned_kernel_needs_what_cudnn_does(cudnn, remat):
    heads = {"hidden_size": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64}
    run = dataclasses.replace(LLAMA, **heads, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=remat)
    ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    params = jax.eval_shape(Llama(run).init, jax.random.key(0), IDS)

    def needs(attention):
        net = Llama(dataclasses.replace(run, attention=attention))
        fn = jax.grad(lambda params, ids: net.apply(params, ids, method="hidden").astype(jnp.float32).sum())
        with jax.numpy_dtype_promotion("standard"):
            return sorted((x.shape, str(x.dtype)) for x in fullest(jax.make_jaxpr(fn)(params, ids)) if x.size)

    assert needs(fused_attention) == needs("cudnn")


def test_fused_keeps_the_attention_alone(cudnn):
    """Of a layer: its input, what the attention adds, and a float32 number for each head and token."""
    heads = {"hidden_size": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64}
    run = dataclasses.replace(LLAMA, **heads, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, attention="cudnn")
    ids = jnp.zeros((1, 64), jnp.int32)

    def kept(layers, remat):
        with jax.numpy_dtype_promotion("standard"):
            return activations(adapted(Llama(dataclasses.replace(run, num_layers=layers)), ids, remat)[1])

    one = {remat: kept(4, remat) - kept(3, remat) for remat in ("full", "fused")}
    assert one["fused"] - one["full"] == 64 * (128 * 2 + 2 * 4)


def needing(**sizes):
    """A step for each policy that needs so many bytes, as XLA would say it; and which ones were compiled."""
    compiled = []

    def make(policy):
        def compile_():
            compiled.append(policy)
            return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(
                argument_size_in_bytes=100, output_size_in_bytes=100, alias_size_in_bytes=100,
                temp_size_in_bytes=sizes[policy] - 100))  # fmt: skip

        return SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=compile_))

    return make, compiled


@pytest.mark.parametrize(("limit", "policy"), [(1000, "none"), (999, "attention"), (600, "attention"), (599, "full")])
def test_the_cheapest_that_fits(limit, policy):
    make, compiled = needing(none=1000, attention=600, full=300)
    found, needs = fitting(make, (), limit)
    assert found == policy and compiled == list(needs) == list(POLICIES[: POLICIES.index(policy) + 1])


def test_none_fits():
    make, _ = needing(none=2**31, attention=2**30, full=2**29)
    with pytest.raises(TooLarge, match=r"more than 0.25 GiB .*none 2.00 GiB, attention 1.00 GiB, full 0.50 GiB.*batch"):
        fitting(make, (), 2**28)


def test_a_run_decides_and_has_the_same_losses(files, tmp_path, capsys):  # noqa: F811
    args = ("lora", ",rank=2,targets=qv", "--config.probe=false", "--config.epochs=1")
    glue.main(words(files, tmp_path / "auto", *args, "--config.remat=auto", "--config.memory=0.5"))
    assert "remat=none: of 0.50 GiB the step needs " in capsys.readouterr().out
    glue.main(words(files, tmp_path / "full", *args, "--config.remat=full"))
    ours, theirs = ([row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("auto", "full"))
    assert len(ours) == 8
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert json.loads((folder(tmp_path / "auto") / "summary.json").read_text())["memory"] > 0


@pytest.mark.parametrize("experiment", ["glue", "lm", "vision"])
def test_a_device_with_less_memory_gets_another_policy(experiment, files, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The device is said to have room for 600 bytes; steps are said to need 1000, or 600 where their trace has more
    checkpoints than the first: what is compiled is the model with the policy, and the one that fits is taken."""
    tried = []

    def needs(jitted, *args):
        tried.append(str(jitted.trace(*args).jaxpr).count("policy="))  # GELU has some of its own
        return 600 if tried[-1] > tried[0] else 1000

    monkeypatch.setattr(dial, "step_bytes", needs)
    monkeypatch.setattr(dial, "memory", lambda: 600 / dial.ROOM)
    if experiment == "glue":
        glue.main(words(files, tmp_path, "lora", ",rank=2,targets=qv", "--config.probe=false", "--config.epochs=1",
                        "--config.shapes=1", "--config.remat=auto"))  # fmt: skip
    elif experiment == "lm":
        lm.main(["--config=configs/e2e.py:smoke", f"--workdir={tmp_path}", "--config.remat=auto",
                 "--config.generate=-1", "--config.unrelated.text=none", "--config.examples=8"])  # fmt: skip
    else:
        vision.main([f"--config=configs/vit.py:model={vit_folder(tmp_path / 'vit')},rank=2", f"--workdir={tmp_path}",
                     f"--config.data={folder_of_images(tmp_path / 'data')}", "--config.size=8", "--config.batch=10",
                     "--config.epochs=1", "--config.pad=1", "--config.probe=false", "--config.remat=auto"])  # fmt: skip
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("remat="))
    assert line == "remat=attention: of 0.00 MiB the step needs 0.00 MiB (none), 0.00 MiB (attention)"
    assert len(tried) == 2 and len(list(tmp_path.rglob("summary.json"))) == 1


@pytest.mark.parametrize(("more", "says"), [
    (["--config.remat=ful"], r"remat 'ful'.*did you mean 'full'|'ful'.*full"),
    (["--config.memory=8"], "memory=8 is the GiB of a device that remat='auto' may use, and remat is 'none'"),
    (["--config.remat=auto", "--config.memory=-1"], "memory=-1 is .*set remat=auto and more than 0"),
])  # fmt: skip
def test_nonsense_is_refused(files, tmp_path, more, says):  # noqa: F811
    with pytest.raises(config.ConfigError, match=says):
        glue.main(words(files, tmp_path, "lora", ",rank=2", *more))


def test_a_sweep_names_its_policy():
    with pytest.raises(config.ConfigError, match="remat='auto' is decided for one run.*take remat=none"):
        members.prepared(config.parse(["--config=configs/lora.py:smoke", "--config.remat=auto"]).config)
