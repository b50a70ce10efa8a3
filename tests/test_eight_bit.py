"""8-bit and offloaded optimizer states: against NumPy, bitsandbytes and the same optimizer without them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lorajax.optim.offload as offload
from lorajax.optim import NAMES, eight_bit, offloaded
from lorajax.quant import dynamic


@pytest.fixture(autouse=True)
def _optax_promotes() -> Any:
    """optax's bias correction raises a float to an int32 count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def gradients(shape: tuple[int, ...], steps: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) * np.float32(10.0 ** rng.integers(-3, 1)) for _ in range(steps)]


def run(tx: Any, start: Any, grads: list[np.ndarray]) -> tuple[Any, Any]:
    @jax.jit
    def step(p: Any, state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    state = tx.init(start)
    for g in grads:
        start, state = step(start, state, {"w": g, "small": np.asarray(g)[:1, :8]})
    return start, state


def test_moments_are_held_in_eight_bits_of_their_maps() -> None:
    start = {"w": jnp.ones((16, 100)), "small": jnp.ones((1, 8))}
    grads = gradients((16, 100), 4)
    tx = eight_bit(optax.adam(1e-2), block=256, smallest=1000)
    got, state = run(tx, start, grads)
    adam = state[0]
    assert adam.mu["w"].codes.dtype == adam.nu["w"].codes.dtype == jnp.uint8
    assert adam.mu["w"].scales.shape == (7,)  # 1600 elements; the last block is shorter
    assert adam.mu["small"].dtype == jnp.float32
    # The same by hand: arXiv 2110.02861, section 2: dequantise, one step in float32, quantise.
    p, codes = np.ones(1600), {"mu": (np.zeros(1600), True), "nu": (np.zeros(1600), False)}
    for t, g in enumerate(grads, 1):
        g = g.reshape(-1).astype(np.float64)
        mu, nu = 0.9 * codes["mu"][0] + 0.1 * g, 0.999 * codes["nu"][0] + 0.001 * g**2
        p -= 1e-2 * (mu / (1 - 0.9**t)) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8)
        for name, x in (("mu", mu), ("nu", nu)):
            values = dynamic.dynamic_map(codes[name][1]).astype(np.float64)
            held = []
            for block in np.split(x, range(256, 1600, 256)):
                scale = np.abs(block).max()
                held.append(values[np.abs(block[:, None] / scale - values).argmin(1)] * scale)
            codes[name] = (np.concatenate(held), codes[name][1])
    np.testing.assert_allclose(np.asarray(got["w"]).reshape(-1), p, atol=2e-4)
    plain, _ = run(optax.adam(1e-2), start, grads)
    np.testing.assert_array_equal(got["small"], plain["small"])
    assert 0 < np.abs(got["w"] - plain["w"]).max() < 0.02


def test_a_quarter_of_the_memory() -> None:
    state = jax.eval_shape(eight_bit(optax.adam(1e-2)).init, {"w": jnp.zeros((512, 512))})
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert held / (2 * 4 * 512 * 512) == pytest.approx(0.25 + 1 / 256, rel=1e-4)
    with pytest.raises(ValueError, match="block=1"):
        eight_bit(optax.adam(1e-2), block=1)


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="JAX 0.10.0 leaves results of jit on the device")
def test_offloaded_states_lie_on_the_host_and_change_no_number() -> None:
    start = {"w": jnp.ones((16, 100)), "small": jnp.ones((1, 8))}
    grads = gradients((16, 100), 3)
    got, state = run(offloaded(optax.adam(1e-2)), start, grads)
    want, plain = run(optax.adam(1e-2), start, grads)
    assert {x.sharding.memory_kind for x in jax.tree.leaves((state[0].mu, state[0].nu))} == {"pinned_host"}
    assert jax.tree.all(jax.tree.map(np.array_equal, got, want))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), state, plain))


def test_a_backend_without_host_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def addressable_memories(self) -> list[Any]:
            return []

    monkeypatch.setattr(offload.jax, "devices", lambda: [Device()])
    offload.require.cache_clear()
    with pytest.raises(ValueError, match="cannot lie in pinned host memory here.*take 'adamw_8bit'"):
        offloaded(optax.adam(1e-2)).init({"w": jnp.zeros(3)})
    monkeypatch.undo()
    offload.require.cache_clear()


def test_names() -> None:
    assert {"adamw_8bit", "adamw_paged"} <= set(NAMES)


@pytest.mark.peft
def test_bitsandbytes_adam() -> None:
    """Its blockwise 8-bit Adam on a CPU."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    grads = gradients((64, 100), 4)
    p = torch.nn.Parameter(torch.ones(64, 100))
    theirs = bnb.optim.Adam8bit([p], lr=1e-2)
    try:
        for g in grads:
            p.grad = torch.tensor(g)
            theirs.step()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this bitsandbytes has no 8-bit Adam on a CPU: {error}")
    start = {"w": jnp.ones((64, 100)), "small": jnp.ones((1, 8))}
    ours, _ = run(eight_bit(optax.adam(1e-2)), start, grads)
    plain, _ = run(optax.adam(1e-2), start, grads)
    difference = np.abs(ours["w"] - p.detach().numpy()).mean()
    assert difference < 0.25 * np.abs(ours["w"] - plain["w"]).mean()


@pytest.mark.parametrize("spec", [P("data", "model"), P(None, ("data", "model"))], ids=str)
def test_on_a_mesh_with_explicit_axes(spec: P) -> None:
    """The codes lie where the array lies, and are those of one device, whatever blocks the mesh cuts."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    start, grads = {"w": jnp.ones((16, 104)), "small": jnp.ones((1, 8))}, gradients((16, 104), 3)
    tx = eight_bit(optax.adam(1e-2), block=256, smallest=1000)
    want, state = run(tx, start, grads)
    with jax.set_mesh(mesh):
        at = NamedSharding(mesh, spec)
        spread = {"w": jax.device_put(start["w"], at), "small": start["small"]}
        got, held = run(tx, spread, [jax.device_put(g, at) for g in grads])
    assert held[0].mu["w"].codes.sharding.spec == spec
    for one, two in zip(jax.tree.leaves((got, held)), jax.tree.leaves((want, state)), strict=True):
        np.testing.assert_allclose(np.float32(one), np.float32(two), rtol=1e-6, atol=1e-7)
