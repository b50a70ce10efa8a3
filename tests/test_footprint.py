"""The memory estimate of a packed step, against XLA's own count and against sizes by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj
from lorajax import control, optim
from lorajax.train.footprint import Footprint, footprint, kept, step_bytes
from lorajax.train.pack import Parts, make_packed_step, pack
from lorajax.train.step import init_state

WIDE, ROWS, RANK = 64, 256, 4
PARAMS = {f"layer_{i}": jnp.ones((WIDE, WIDE), jnp.float32) / WIDE for i in range(4)}
BATCH = {"x": np.ones((ROWS, WIDE), np.float32)}


def apply(params: Any, x: jax.Array) -> jax.Array:
    for i in range(4):
        x = jnp.tanh(x @ params[f"layer_{i}"])
    return x


def parts(values: Any) -> Parts:
    adapt = lj.adapt(lj.sites(apply, PARAMS, BATCH["x"]), [(".*", lj.LoRA(rank=RANK))])

    def loss(bound: Any, batch: Any, key: jax.Array) -> Any:
        return jnp.mean(jnp.square(lj.lift(apply)(bound, batch["x"]))), {}

    return Parts(loss, adapt, optim.lora_plus(1e-3, 4.0, labels=adapt.labels), control.identity())


def packed_bytes(runs: int) -> int:
    made, members = parts({}), []
    for seed in range(runs):
        trainable, frozen = made.adapt.init(jax.random.key(seed), PARAMS)
        state = init_state(jax.random.key(seed), trainable, made.tx, made.controller)
        members.append((state, frozen._replace(base=PARAMS), {}))
    together = pack(members)
    step = make_packed_step(parts)
    batches = jax.tree.map(lambda x: np.stack([x] * runs), BATCH)
    return step_bytes(step.jitted, together.state, together[1:], batches, np.ones(runs, bool))  # type: ignore[attr-defined]


def test_the_estimate_is_near_what_xla_counts() -> None:
    found = footprint(parts({}), PARAMS, BATCH)
    assert found.shared == 4 * 4 * WIDE * WIDE
    # Kept for the backward pass: what leaves each layer's tanh, and x A.
    adapters = 4 * 4 * 2 * RANK * WIDE
    assert found.own > 4 * ROWS * (4 * WIDE + 4 * RANK) + 6 * adapters
    two, six = packed_bytes(2), packed_bytes(6)
    each = (six - two) / 4
    assert found.own == pytest.approx(each, rel=0.1)
    assert found.of(6) == pytest.approx(six, rel=0.1)


def test_what_fits() -> None:
    size = Footprint(shared=100, own=10)
    assert size.of(3) == 130
    assert [size.runs(limit, most=8) for limit in (50, 100, 119, 120, 155, 1000)] == [1, 1, 1, 2, 5, 8]


def test_a_program_that_ran_is_not_compiled_again() -> None:
    compiled: list[str] = []

    def note(name: str, *_: Any, **__: Any) -> None:
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    jitted, x = jax.jit(lambda x: x @ x), jnp.ones((8, 8))
    jitted(x)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        assert step_bytes(jitted, x) >= 2 * x.nbytes
        assert compiled == []
        jax.jit(lambda x: x @ x @ x)(x)
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("rows", [64, 512])
def test_activations_grow_with_the_batch(rows: int) -> None:
    def at(n: int) -> int:
        return footprint(parts({}), PARAMS, {"x": jax.ShapeDtypeStruct((n, WIDE), jnp.float32)}).own

    assert at(2 * rows) - at(rows) == at(rows) - at(0)


def test_activations_found_at_one_length_are_those_of_another() -> None:
    """Attention: scores grow with the square of the length."""
    params = {"q": jnp.ones((WIDE, WIDE)), "v": jnp.ones((WIDE, WIDE))}

    def attend(params: Any, x: jax.Array) -> jax.Array:
        scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x @ params["q"], x))
        return jnp.einsum("bqk,bkd->bqd", scores, jnp.tanh(x @ params["v"]))

    sites = lj.sites(attend, params, np.ones((2, 8, WIDE), np.float32))
    adapt = lj.adapt(sites, [(".*", lj.LoRA(rank=RANK))])
    loss = lambda bound, batch, key: (jnp.mean(jnp.square(lj.lift(attend)(bound, batch["x"]))), {})  # noqa: E731
    made = Parts(loss, adapt, optim.lora_plus(1e-3, 4.0, labels=adapt.labels), control.identity())

    def batch(rows: int, length: int) -> Any:
        return {"x": jax.ShapeDtypeStruct((rows, length, WIDE), jnp.float32)}

    found = kept(made, params, batch(3, 32), tokens=True)
    assert found.pair > 0
    for rows, length in ((3, 32), (8, 100), (1, 7)):
        want = footprint(made, params, batch(rows, length))  # traced at its own length
        assert footprint(made, params, batch(rows, length), found) == want
