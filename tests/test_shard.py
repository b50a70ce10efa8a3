"""Meshes, rules for base weights, what follows for adapters and states, and loading: no program is compiled here."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import ROWS, Row
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from test_conformance import network

import lorajax as lj
from lorajax import quant
from lorajax.control import adalora
from lorajax.core.sites import by_path
from lorajax.io import hf
from lorajax.models import Bert, BertConfig, GPT2Config, LlamaConfig, T5Config, ViTConfig, WhisperConfig, params_from_hf
from lorajax.models.checkpoint import layout
from lorajax.models.families import FAMILIES as MODELS
from lorajax.shard.follow import adapter_specs, state_specs
from lorajax.shard.mesh import AXES, MeshError, make_mesh, sizes_of
from lorajax.shard.placement import LOCAL, Placement
from lorajax.shard.rules import FAMILIES, specs
from lorajax.train.step import init_state

BERT = Path(__file__).parent / "goldens" / "bases" / "bert_a"
SHAPE = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731


def test_sizes_of_a_mesh() -> None:
    assert sizes_of({"data": -1}, 8) == {"trial": 1, "data": 8, "fsdp": 1, "tensor": 1}
    assert sizes_of({"data": -1, "tensor": 4}, 8)["data"] == 2
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
    assert mesh is not None
    assert dict(mesh.shape) == {"trial": 1, "data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_names) == set(AXES)
    small = make_mesh({"tensor": 2})
    assert small is not None
    assert small.devices.size == 2
    assert make_mesh({}) is None


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tensr": 2}, "no axis 'tensr': did you mean 'tensor'"),
        ({"data": 0}, "mesh.data=0 is no number of devices"),
        ({"data": 2.5}, "mesh.data=2.5 is no number of devices"),
        ({"data": "2"}, "mesh.data='2' is no number of devices"),
        ({"data": -1, "fsdp": -1}, "only one axis can be -1"),
        ({"data": -1, "tensor": 3}, "3 does not divide 8 devices; the nearest that does is"),
        ({"data": 4, "tensor": 4}, "takes 16 devices and there are 8"),
    ],
)
def test_sizes_that_do_not_fit(sizes: Any, words: str) -> None:
    with pytest.raises(MeshError, match=words):
        make_mesh(sizes)


def test_no_row_of_a_batch_is_left_out() -> None:
    np.testing.assert_array_equal(LOCAL.share(6, 2), np.arange(6))
    with pytest.raises(MeshError, match="accumulate=3 does not divide a batch of 32 rows: the nearest .* is 33"):
        LOCAL.share(32, 3)


CONFIGS = {
    "llama": LlamaConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8,
                         intermediate_size=64),
    "gpt2": GPT2Config(vocab_size=65, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64,
                       max_positions=8),
    "bert": BertConfig(vocab_size=65, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64,
                       max_positions=8),
    "t5": T5Config(vocab_size=64, hidden_size=32, num_layers=2, num_decoder_layers=2, num_heads=4, head_dim=8,
                   intermediate_size=64),
    "vit": ViTConfig(hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64, image_size=8, patch_size=4),
    "whisper": WhisperConfig(vocab_size=65, mels=4, hidden_size=32, num_layers=2, num_decoder_layers=2, num_heads=4,
                             num_decoder_heads=4, intermediate_size=64, decoder_intermediate_size=64),
}  # fmt: skip


def leaves_of(family: str, scan: bool) -> dict[str, Any]:
    config = dataclasses.replace(CONFIGS[family], scan_layers=scan)  # type: ignore[type-var]
    model = next(row.model for row in MODELS.values() if row.config is type(config))(config)
    return by_path(jax.eval_shape(model.init, jax.random.key(0), *layout(config).inputs))[0]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_weight_of_a_family_has_its_place(family: str, scan: bool) -> None:
    """Each matrix of a layer is cut along both axes, columns into heads and rows out of them; vectors are not."""
    leaves = leaves_of(family, scan)
    found = specs(leaves, {"fsdp": 2, "tensor": 4}, defaults=FAMILIES[family])
    assert found.keys() == leaves.keys()
    lead = (None,) if scan else ()
    kernels = [p for p in leaves if "layer" in p and p.endswith("kernel")]
    assert len(kernels) >= (4 if scan else 8)
    for path in kernels:
        column = path.split("/")[-2] in ("query", "key", "value", "query_key_value", "up", "gate")
        assert found[path] == P(*lead, *(("fsdp", "tensor") if column else ("tensor", "fsdp"))), path
    for path in leaves:
        if "norm" in path:
            assert set(found[path]) <= {None}, path
    tables = [p for p in leaves if p.endswith(("embed/embedding", "word/embedding"))]
    assert all("fsdp" in found[path] for path in tables)


def test_a_table_says_where_everything_lies() -> None:
    leaves = leaves_of("llama", False)
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    text = Placement(mesh, (), FAMILIES["llama"]).describe(leaves)
    (row,) = [line for line in text.splitlines() if "attention/query" in line]
    assert row.split() == ["params/layer_*/attention/query/kernel", "32,32", "fsdp,", "tensor", "16,8", "2"]
    held = sum(x.size // (1 if "norm" in p else 8) * 4 for p, x in leaves.items())
    assert f"fsdp 2 x tensor 4: {held / 2**20:.1f} of the base's" in text


LEAVES = {"params/layer_0/attention/query/kernel": SHAPE(12, 20), "params/norm/scale": SHAPE(12)}


@pytest.mark.parametrize(
    ("rules", "defaults", "words"),
    [
        ([("params/norms.*", ("fsdp",))], [(".*", ())], "matches no weight.*nearest are 'params/norm/scale'"),
        ([(".*", ()), (".*/kernel", ("fsdp",))], [(".*", ())], r"takes nothing: '\.\*' before it"),
        ([("*kernel", ("fsdp",))], [], r"the sharding rule '\*kernel' is no regular expression: nothing to repeat"),
        ([(".*/kernel", ("fsd",))], [(".*", ())], "mesh axis 'fsd': did you mean 'fsdp'"),
        ([(".*/scale", (None, "fsdp"))], [(".*", ())], r"2 entries, and params/norm/scale has shape \(12,\)"),
        ([(".*/kernel", ("fsdp", "fsdp"))], [(".*", ())], "names a mesh axis twice"),
        ([(".*/kernel", (None, "fsdp"))], [(".*", ())],
         r"query/kernel has shape \(12, 20\), and fsdp 8 does not divide its dimension 1 of 20: .* is 5"),
        ([(".*/kernel", ())], [], r"no sharding rule matches 'params/norm/scale' \(12,\): add one"),
    ],
)
def test_rules_that_do_not_fit(rules: Any, defaults: Any, words: str) -> None:
    with pytest.raises(MeshError, match=words):
        specs(LEAVES, {"fsdp": 8, "tensor": 1}, rules, defaults)


def test_an_axis_of_one_device_is_left_out() -> None:
    found = specs(LEAVES, {"fsdp": 1, "tensor": 4}, [(".*/kernel", ("fsdp", ("tensor", "data")))])
    assert found["params/layer_0/attention/query/kernel"] == P(None, "tensor")


WHERE = [(".*up/kernel", ("fsdp", "tensor")), (".*down/kernel", (("tensor", "fsdp"), None))]
SIZES = {"fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items() if row.in_model])
def test_adapters_lie_where_their_weights_lie(row: Row) -> None:
    """By hand, from the shapes alone: a dimension as long as the weight's in-side lies where that side lies."""
    sites = network(True, jnp.float32)[-1]
    adapt = lj.adapt(sites, [(".*kernel", row.variant)])
    base = specs(sites.leaves, SIZES, WHERE)
    trainable, frozen = adapter_specs(adapt, base, SIZES)
    shapes = adapt.shapes
    sides = {"up": {8: "fsdp", 12: "tensor"}, "down": {12: ("tensor", "fsdp"), 8: None}}
    for name, side in sides.items():
        path = f"params/layers/{name}/kernel"
        for half, shape in ((trainable, shapes[0]), (frozen.aux, shapes[1].aux)):
            for leaf, spec in ({} if path not in half else half[path]._asdict()).items():
                x = None if path not in shape else getattr(shape[path], leaf)
                if x is None:
                    assert spec is None
                    continue
                axes = (None, *row.variant.leaves[leaf].axes)
                want = [side[n] if axis in ("in", "out") and n in side else None
                        for n, axis in zip(x.shape, axes, strict=True)]
                assert tuple(spec) == tuple(want), (name, leaf, x.shape)
    for tree in (frozen.shared, {k: v for k, v in trainable.items() if k.startswith("shared:")}):
        assert all(spec == P() for spec in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, P)))


def test_states_follow_their_arrays() -> None:
    sites = network(False, jnp.float32)[-1]
    adapt = lj.adapt(sites, [(".*up/kernel", lj.AdaLoRA(rank=4)), (".*", lj.Full())])
    base = specs(sites.leaves, SIZES, WHERE)
    trainable, _ = adapter_specs(adapt, base, SIZES)
    tx = optax.multi_transform({"full": optax.sgd(0.1), "a": optax.adamw(0.1), "b": optax.adamw(0.1),
                                "e": optax.adamw(0.1)}, adapt.labels)  # fmt: skip
    controller = adalora(adapt, total_steps=10, target_rank=2.0)
    state = jax.eval_shape(lambda k, t: init_state(k, t, tx, controller), jax.random.key(0), adapt.shapes[0])
    found = state_specs(state, adapt.shapes[0], trainable)
    up, down = "params/layer_1/up/kernel", "params/layer_1/down/kernel"
    assert found.trainable[up] == trainable[up]._replace(A=P("fsdp", None), E=P(None), B=P(None, "tensor"))
    assert found.trainable[down].w == P(("tensor", "fsdp"), None)
    moments = found.opt_state.inner_states["a"].inner_state[0]
    assert moments.mu[up].A == moments.nu[up].A == P("fsdp", None)
    assert moments.count == P()
    assert found.control.mean[up].B == P(None, "tensor")
    assert found.control.kept[up] == P()
    assert found.step == found.key == P()


class Counting(hf.Tensors):
    """How much is read, and the largest piece."""

    total = largest = 0

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        found = super().part(name, index)
        Counting.total, Counting.largest = Counting.total + found.nbytes, max(Counting.largest, found.nbytes)
        return found

    def __getitem__(self, name: str) -> np.ndarray:
        raise AssertionError(f"{name} is read whole")


@pytest.mark.parametrize("scan", [False, True])
def test_a_checkpoint_is_read_part_by_part(scan: bool) -> None:
    """Each part that a device holds is read once, however many hold it, and no more than one part at a time."""
    checkpoint = hf.open_checkpoint(BERT)
    config = BertConfig.from_hf(checkpoint.config, num_labels=2, scan_layers=scan)
    theirs = load_file(BERT / "model.safetensors")
    how: Any = {"key": jax.random.key(0), "ignore": [r"classifier\..*"]}
    whole, _ = by_path(params_from_hf(config, theirs, **how).variables)
    place = Placement(make_mesh({"fsdp": 4, "tensor": 2}), (), FAMILIES["bert"])
    Counting.total = Counting.largest = 0
    loaded = params_from_hf(config, Counting(checkpoint.tensors._where), **how, shardings=place.base)
    assert len(loaded.fresh) == 2
    got, _ = by_path(loaded.variables)
    assert got.keys() == whole.keys()
    held: dict[Any, int] = {}
    for path, x in got.items():
        np.testing.assert_array_equal(x, whole[path], err_msg=path)
        for shard in x.addressable_shards:
            if path not in loaded.fresh:
                held[path, str(shard.index)] = shard.data.nbytes
    assert Counting.total == sum(held.values())  # each part once, though several devices hold some
    assert Counting.largest <= max(held.values())
    kernel = got["params/layers/ffn/up/kernel" if scan else "params/layer_0/ffn/up/kernel"]
    assert kernel.sharding.spec == P(*([None] if scan else []), "fsdp", "tensor")


@pytest.mark.parametrize("scan", [False, True])
def test_a_checkpoint_is_quantised_as_it_is_read_onto_a_mesh(scan: bool) -> None:
    """The codes are those of one device, and lie where the weight would."""
    checkpoint = hf.open_checkpoint(BERT)
    config = BertConfig.from_hf(checkpoint.config, num_labels=2, scan_layers=scan)
    how: Any = {"key": jax.random.key(0), "ignore": [r"classifier\..*"]}
    net = Bert(config)
    shapes = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 4), np.int32))
    plan = quant.plan(lj.sites(net.apply, shapes, np.zeros((1, 4), np.int32)), [("all-linear", quant.Int8())])
    whole, _ = by_path(params_from_hf(config, load_file(BERT / "model.safetensors"), **how).variables)
    place = Placement(make_mesh({"fsdp": 4, "tensor": 2}), (), FAMILIES["bert"])
    Counting.total = Counting.largest = 0
    loaded = params_from_hf(config, Counting(checkpoint.tensors._where), **how, shardings=place.base, place=plan.place)
    got, where = by_path(loaded.variables)[0], place.base(whole)
    assert {path for path, x in got.items() if isinstance(x, quant.Quantized)} == set(plan.rows)
    for path, x in whole.items():
        if path not in plan.rows:
            np.testing.assert_array_equal(got[path], x, err_msg=path)
            continue
        codes, order = got[path].codes, plan.rows[path].order
        np.testing.assert_array_equal(codes, quant.quantize(x, *plan.rows[path]).codes, err_msg=path)
        assert codes.sharding.spec == P(*[where[path].spec[d] for d in order]), path
    assert Counting.largest < max(x.nbytes for x in whole.values())
    assert Counting.total <= sum(x.nbytes for x in whole.values())
