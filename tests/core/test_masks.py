"""Masks of single leaves, and masks that act where they do not train. Rank masks are in test_adapt.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj
from lorajax.core.masks import Mask, keep

from .probe import Probe, ProbeAdapter

RNG = np.random.default_rng(0)
STACK, DENSE, HEAD = RNG.normal(size=(2, 4, 4)), RNG.normal(size=(4, 6)), RNG.normal(size=(6, 2))
X = RNG.normal(size=(5, 4))


def fn(params: dict[str, Any], x: Any) -> Any:
    x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["stack"])
    return jnp.tanh(x @ params["dense"]) @ params["head"]


def setup() -> tuple[Any, dict[str, Any], Any]:
    params = {"stack": jnp.float32(STACK), "dense": jnp.float32(DENSE), "head": jnp.float32(HEAD)}
    adapt = lj.adapt(lj.sites(fn, params, jnp.float32(X)), [("head", lj.Full()), (".*", Probe())])
    return adapt, *jax.jit(adapt.init)(jax.random.key(0), params)


def test_masks_of_single_leaves_multiply_these() -> None:
    """One array of an adapter element by element, per layer of a stack; the weight of a `Full` site."""
    adapt, trainable, frozen = setup()
    masks = {"stack": ProbeAdapter(None, RNG.integers(0, 2, (2, 3, 4)).astype(bool)),
             "dense": ProbeAdapter(np.float32(RNG.normal(size=(4, 3))), np.float32(RNG.normal(size=(3, 6)))),
             "head": lj.FullAdapter(RNG.integers(0, 2, (6, 2)))}
    merged = jax.jit(lambda m: adapt.merge(trainable, frozen, masks=m))(masks)
    stack, dense = ([np.float64(x) for x in trainable[path]] for path in ("stack", "dense"))
    np.testing.assert_allclose(merged["stack"], STACK + 0.5 * stack[0] @ (stack[1] * masks["stack"].b), atol=1e-5)
    want = DENSE + 0.5 * (dense[0] * masks["dense"].a) @ (dense[1] * masks["dense"].b)
    np.testing.assert_allclose(merged["dense"], want, atol=1e-5)
    np.testing.assert_array_equal(merged["head"], np.float32(HEAD) * masks["head"].w)


def test_a_mask_may_act_where_it_does_not_train() -> None:
    """The value is that of `on`; the gradient is that of `on` where `trains` is not 0, and exactly 0 elsewhere."""
    adapt, trainable, frozen = setup()
    on, trains = np.float32([2.0, 0.5, 0.0]), np.float32([0, 3, 1])
    plain = {"stack": np.stack([on, on[::-1]]), "dense": on}
    held = {"stack": Mask(plain["stack"], np.stack([trains, trains[::-1]])), "dense": Mask(on, trains)}

    @jax.jit
    def value_and_grad(masks: Any) -> Any:
        run = lambda t: jnp.sum(jnp.sin(lj.lift(fn)(adapt.bind(t, frozen, masks=masks), jnp.float32(X))))  # noqa: E731
        return jax.value_and_grad(run)(trainable)

    (want, whole), (got, grads) = value_and_grad(plain), value_and_grad(held)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for path, m in held.items():
        passes = np.float32(m.trains != 0)
        for g, full, mask in zip(grads[path], whole[path], (passes[..., None, :], passes[..., None]), strict=True):
            np.testing.assert_allclose(g, full * mask, rtol=1e-5, atol=1e-6)
            assert np.abs(full * (1 - mask)).max() > 1e-2
    np.testing.assert_allclose(grads["head"].w, whole["head"].w, rtol=1e-5)


@pytest.mark.parametrize(
    ("mask", "moved"),
    [(np.float32([1, 0, 0.5]), [1, 0, 1]), (Mask(np.float32([1, 1, 0])), [1, 1, 0]),
     (Mask(np.ones(3), np.float32([0, 1, 0])), [0, 1, 0]),
     (Mask(np.zeros(3), np.zeros(3), np.ones(3)), [1, 1, 1]),
     (Mask(np.ones(3), None, np.float32([0, 0, 1])), [0, 0, 1]),
     (ProbeAdapter(np.tile(np.float32([1, 0, 0]), (4, 1)), np.tile(np.float32([[1], [0], [0]]), (1, 6))), [1, 0, 0])],
)
def test_what_a_mask_lets_move(mask: Any, moved: list[int]) -> None:
    new, old = ProbeAdapter(jnp.ones((4, 3)), jnp.ones((3, 6))), ProbeAdapter(jnp.zeros((4, 3)), jnp.zeros((3, 6)))
    kept = keep(mask, Probe.leaves, new, old)
    np.testing.assert_array_equal(kept.a, np.tile(np.float32(moved), (4, 1)))
    np.testing.assert_array_equal(kept.b, np.tile(np.float32(moved)[:, None], (1, 6)))


@pytest.mark.parametrize(
    ("path", "mask", "words"),
    [
        ("dense", np.ones(4), r"a mask of shape \(4,\) does not fit a of shape \(4, 3\).* then the rank, \(3,\)"),
        ("stack", np.ones(3), r"does not fit a of shape \(2, 4, 3\).* then the rank, \(2, 3\)"),
        ("dense", ProbeAdapter(np.ones((1, 3)), None), r"\(1, 3\) does not fit a of shape \(4, 3\)"),
        ("dense", lj.FullAdapter(np.ones(3)), "of type FullAdapter for a ProbeAdapter: give one of the adapter's own"),
        ("head", np.ones(2), "a rank mask for a FullAdapter, which trains nothing that has a rank axis"),
    ],
)
def test_masks_that_do_not_fit_are_refused(path: str, mask: Any, words: str) -> None:
    adapt, trainable, frozen = setup()
    with pytest.raises(ValueError, match=words):
        adapt.bind(trainable, frozen, masks={path: mask})
