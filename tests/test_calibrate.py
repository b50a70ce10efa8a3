"""calibrate: what the weights of a model saw, collected in a stream, against a forward pass written down in NumPy."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj
from lorajax.core.variant import Leaf, Seen, Statistic, Variant
from lorajax.variants import LoRA
from lorajax.variants.eva import EVA

rng = np.random.default_rng(0)
B, T, D = 3, 4, 6


class Empty(NamedTuple):
    pass


@dataclass(frozen=True)
class Look(Variant):
    """Collects what it is shown, as it is: the last batch and the sum of all."""

    of: str = "inputs"
    stop: int = 99
    leaves: ClassVar[dict[str, Leaf]] = {}

    @property
    def statistic(self) -> Statistic:
        def init(n_in: int, n_out: int) -> Any:
            like = (Seen(jnp.zeros((n_in, n_in)), jnp.zeros(n_in), jnp.zeros(()), jnp.zeros(()))
                    if self.of == "inputs" else jnp.zeros((n_in, n_out)))
            return {"last": like, "sum": like, "batches": jnp.zeros((), jnp.int32)}

        def update(state: Any, saw: Any) -> Any:
            total = jax.tree.map(jnp.add, state["sum"], saw)
            return {"last": saw, "sum": total, "batches": state["batches"] + 1}

        return Statistic(self.of, init, update, done=lambda state: state["batches"] >= self.stop)

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[Empty, jax.Array]:
        return Empty(), w


def net(params: Any, x: jax.Array) -> jax.Array:
    """Two rematerialised layers in a scan, each with a kernel (D, heads, size) and one (heads, size, D) that is stored
    the other way round; then a pooled head."""

    @jax.checkpoint
    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        h = jnp.tanh(jnp.einsum("btd,dhs->bths", x, w["up"]))
        return x + jnp.einsum("bths,dhs->btd", h, w["down"]), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return jnp.tanh(x[:, 0] @ params["pool"]) @ params["head"]


PARAMS = {"layers": {"up": jnp.float32(rng.normal(size=(2, D, 2, 5)) / 3),
                     "down": jnp.float32(rng.normal(size=(2, D, 2, 5)) / 3)},
          "pool": jnp.float32(rng.normal(size=(D, D)) / 2), "head": jnp.float32(rng.normal(size=(D, 3)))}
BATCHES = [{"x": jnp.float32(rng.normal(size=(B, T, D))),
            "mask": jnp.asarray(rng.random((B, T)) < 0.7).at[:, 0].set(True)} for _ in range(3)]
SITES = lj.sites(net, PARAMS, BATCHES[0]["x"])


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.square(lj.lift(net, strict=True)(params, batch["x"]) - 1.0))


def inputs(batch: Any) -> dict[str, list[np.ndarray]]:
    """path -> the (rows, in) input of each matrix of the site, padding included, in float64."""
    w = jax.tree.map(np.float64, PARAMS)
    x = np.float64(batch["x"])
    seen: dict[str, list[np.ndarray]] = {"layers/up": [], "layers/down": []}
    for up, down in zip(w["layers"]["up"], w["layers"]["down"], strict=True):
        h = np.tanh(np.einsum("btd,dhs->bths", x, up))
        seen["layers/up"].append(x.reshape(-1, D))
        seen["layers/down"].append(h.reshape(B * T, 10))
        x = x + np.einsum("bths,dhs->btd", h, down)
    return {**seen, "pool": [x[:, 0]], "head": [np.tanh(x[:, 0] @ w["pool"])]}


@pytest.mark.parametrize("masked", [False, True])
def test_the_inputs_of_every_weight_are_those_of_a_forward_pass(masked: bool) -> None:
    """Stacked and rematerialised layers, n-dimensional kernels, rows that are padding, rows that are sentences."""
    adapt = lj.adapt(SITES, [(".*", Look())])
    found = lj.calibrate(adapt, loss, PARAMS, BATCHES, mask=(lambda batch: batch["mask"]) if masked else None)
    assert set(found) == {"layers/up", "layers/down", "pool", "head"}
    for path, state in found.items():
        site, each = adapt.sites[path], [inputs(batch)[path] for batch in BATCHES]
        for i in range(len(each[0])):
            pick = (lambda x, i=i: x[i]) if site.stack_axes else (lambda x: x)
            got = jax.tree.map(pick, state)
            if masked and path.startswith("layers"):
                rows = [x[i][np.asarray(batch["mask"]).ravel()] for x, batch in zip(each, BATCHES, strict=True)]
            else:
                rows = [x[i] for x in each]
            assert int(got["batches"]) == 3
            together = np.concatenate(rows)
            np.testing.assert_allclose(got["sum"].gram, together.T @ together, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(got["sum"].total, together.sum(0), rtol=1e-4, atol=1e-4)
            assert int(got["sum"].rows) == len(together)
            np.testing.assert_allclose(got["last"].peak, np.abs(rows[-1]).max(), rtol=1e-5)


def test_gradients_are_those_of_the_loss_one_group_at_a_time() -> None:
    adapt = lj.adapt(SITES, [("layers/.*|head", Look("gradient")), ("pool", Look("inputs"))])
    whole = lj.calibrate(adapt, loss, PARAMS, BATCHES)
    parts = lj.calibrate(adapt, loss, PARAMS, iter(BATCHES), at_once=1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), whole, parts)
    grads = [jax.jit(jax.grad(loss))(PARAMS, batch) for batch in BATCHES]
    want = sum(np.float64(g["layers"]["up"]) for g in grads).reshape(2, D, 10)
    np.testing.assert_allclose(whole["layers/up"]["sum"], want, rtol=1e-4, atol=1e-6)
    down = sum(np.float64(g["layers"]["down"]) for g in grads)  # stored (D, heads, size), contracted over the last two
    np.testing.assert_allclose(whole["layers/down"]["sum"], np.transpose(down, (0, 2, 3, 1)).reshape(2, 10, D),
                               rtol=1e-4, atol=1e-6)


def test_a_stream_ends_when_every_weight_is_done() -> None:
    taken = []

    def batches() -> Any:
        for i, batch in enumerate(BATCHES):
            taken.append(i)
            yield batch

    adapt = lj.adapt(SITES, [("layers/up", Look(stop=1)), ("pool", Look(stop=2))])
    found = lj.calibrate(adapt, loss, PARAMS, batches())
    assert taken == [0, 1]
    assert found["layers/up"]["batches"].tolist() == [1, 1]
    assert int(found["pool"]["batches"]) == 2


def test_a_model_starts_from_what_was_collected_and_is_traced_once() -> None:
    traces = []

    def counted(params: Any, batch: Any) -> jax.Array:
        traces.append(1)
        return loss(params, batch)

    adapt = lj.adapt(SITES, [("layers/.*", LoRA(rank=2, initializer=EVA(tau=1.0))),
                             ("head", LoRA(rank=1, initializer="lora_ga")),
                             ("pool", LoRA(rank=2, initializer="corda"))])
    stats = lj.calibrate(adapt, counted, PARAMS, BATCHES)
    assert len(traces) == 1
    trainable, frozen = jax.jit(adapt.init)(jax.random.key(0), PARAMS, stats)
    for layer in range(2):
        rows = np.concatenate([inputs(batch)["layers/down"][layer] for batch in BATCHES])
        top = np.linalg.svd(rows, full_matrices=False)[2][:2]
        # truncation to 4 of 10 components between batches: the first two are nearly those of all rows at once
        assert np.linalg.svd(top @ np.float64(trainable["layers/down"].A[layer]))[1].min() > 0.9
    out = jax.jit(lambda tr: lj.lift(net, strict=True)(adapt.bind(tr, frozen), BATCHES[0]["x"]))(trainable)
    np.testing.assert_allclose(out, net(PARAMS, BATCHES[0]["x"]), atol=5e-6)
    assert jax.tree.structure(adapt.shapes[1]) == jax.tree.structure(frozen)


def table_net(params: Any, ids: jax.Array) -> jax.Array:
    x = params["table"][ids]
    return jax.lax.stop_gradient(x @ params["first"]) @ params["last"]


TABLE = {"table": jnp.ones((7, 4)), "first": jnp.ones((4, 4)), "last": jnp.ones((4, 4))}
IDS = jnp.arange(5)


@pytest.mark.parametrize(
    ("rule", "batches", "mask", "words"),
    [
        ("table", [IDS], None, r"table is a lookup, and only a matmul's inputs can be collected: give this path"),
        ("first", [IDS], None, r"does not depend on 'first' \(and 0 other paths\).*without stop_gradient"),
        ("last", [], None, r"no batches: a start that reads data needs at least one"),
        ("last", [IDS], lambda ids: jnp.ones((2, 4)), r"last: its inputs have rows \(5,\), which a mask of shape"),
    ],
)
def test_errors(rule: str, batches: Any, mask: Any, words: str) -> None:
    adapt = lj.adapt(lj.sites(table_net, TABLE, IDS), [(rule, Look())])

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        return jnp.sum(lj.lift(table_net)(params, ids))

    with pytest.raises(ValueError, match=words):
        lj.calibrate(adapt, loss, TABLE, batches, mask=mask)


def test_a_weight_used_in_two_ways_is_an_error() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        return (x @ params["w"]) @ params["w"].T

    adapt = lj.adapt(lj.sites(fn, {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))), [("w", Look())])
    with pytest.raises(ValueError, match=r"w: its inputs cannot be collected, for it is used in more than one way"):
        lj.calibrate(adapt, lambda p, x: jnp.sum(lj.lift(fn)(p, x)), {"w": jnp.ones((4, 3))}, [jnp.ones((2, 4))])


def test_nothing_is_collected_where_nothing_reads_data() -> None:
    assert lj.calibrate(lj.adapt(SITES, [("pool", LoRA(rank=2))]), loss, PARAMS, []) == {}
