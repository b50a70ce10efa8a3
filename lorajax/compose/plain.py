"""Any adapter as plain LoRA, which every server reads: lossless where its update has factors, else by SVD.

    plain = as_lora(adapt, trainable, frozen)
    peft.write(folder, plain.adapt, plain.trainable, plain.frozen, names)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.layout import leaf, matrix, over_stack
from lorajax.core.sites import Site
from lorajax.core.variant import Full, Variant
from lorajax.variants.lora import LoRA, LoRAAdapter
from lorajax.variants.plain import restated

EXACT = 1e-6
"""Singular values below this part of the largest are float32 rounding, and are left out."""


class Plain(NamedTuple):
    """adapt, trainable, frozen: of the same function, with LoRA of scale 1 at every site. errors: path -> the part of
    the update that is lost, in Frobenius norm (0 where nothing is; of a stack the largest)."""

    adapt: Adapt
    trainable: dict[str, Any]
    frozen: Frozen
    errors: dict[str, float]


def as_lora(adapt: Adapt, trainable: Mapping[str, Any], frozen: Frozen, *, rank: int | None = None) -> Plain:
    """Every adapter's update as A B. What is trained in full stays as it is.

    An update with factors keeps them: its rank is theirs (AdaLoRA's, twice PiSSA's, k times GraLoRA's). One without
    (LoHa, DoRA, HiRA, ...) is formed and decomposed in float32, keeping what is more than rounding. rank: the largest
    rank to keep; a larger update is truncated by SVD, the best approximation of its rank.
    A weight that a start was folded into is put together again, to float32 rounding.
    Raises ValueError for a rank below 1, and for a variant that weighs tokens apart.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} is below 1: give at least rank=1, or None to lose nothing")
    chosen, trained, base, errors = dict(adapt.chosen), dict(trainable), dict(frozen.base), {}
    for path, choice in adapt.plan.items():
        if isinstance(choice, Full):
            continue
        halves = zip(trainable[path], frozen.aux.get(path, trainable[path]), strict=True)
        adapter = type(trainable[path])(*[other if x is None else x for x, other in halves])
        if choice.rewrites_weight:
            base[path] = _unfolded(adapt, path, adapter, base[path])
        slot = f"shared:{choice.slot}"
        shared = {**trainable.get(slot, {}), **frozen.shared.get(slot, {})} if slot in adapt.slots else {}
        a, b, errors[path] = _factors(adapt.sites[path], choice, adapter, shared, (frozen.base[path], base[path]), rank)
        chosen[path] = chosen[path]._replace(choice=LoRA(rank=a.shape[-1], alpha=float(a.shape[-1])))
        trained[path] = LoRAAdapter(jnp.asarray(a), jnp.asarray(b))
    trained = {path: x for path, x in trained.items() if path in adapt.plan}
    return Plain(replace(adapt, chosen=chosen), trained, Frozen(base, {}, {}), errors)


def _unfolded(adapt: Adapt, path: str, adapter: Any, w: jax.Array) -> jax.Array:
    """The weight before its start was taken from it: `restore` takes it once more, and the difference goes back."""
    site, choice = adapt.sites[path], adapt.plan[path]
    m = matrix(site, w).astype(jnp.float32)
    less = over_stack(site, choice.restore)(adapter, m)  # type: ignore[union-attr]
    return leaf(site, 2 * m - less).astype(w.dtype)


def _factors(site: Site, choice: Variant, adapter: Any, shared: dict[str, jax.Array], weights: tuple[Any, Any],
             rank: int | None) -> tuple[np.ndarray, np.ndarray, float]:
    """(stack..., in, r), (stack..., r, out) and the relative error. weights: what the adapter acts on, and the base."""
    if choice.routed:
        raise ValueError(f"{site.path}: {type(choice).__name__} weighs its update per token, so it is no LoRA")
    shared = choice.read_shared(shared, site.n_in, site.n_out) if shared else {}
    with jax.default_matmul_precision("highest"):
        variant, arrays, _ = restated(choice, adapter)
        if variant.factored:
            read = matrix(site, weights[0]).astype(jnp.float32) if variant.reads_weight else None
            found = over_stack(site, lambda x, w: _pair(variant, x._replace(**shared), w))(arrays, read)
            if found is not None and found[0].shape[-1] <= min(site.n_in, site.n_out, rank or site.n_in):
                return np.asarray(found[0]), np.asarray(found[1]), 0.0
        w, base = (matrix(site, x).astype(jnp.float32) for x in weights)
        delta = over_stack(site, lambda x, w: choice.delta(x._replace(**shared), w))(adapter, w) + (w - base)
    u, s, vt = np.linalg.svd(np.asarray(delta), full_matrices=False)
    needed = max(1, int(np.max(np.sum(s > EXACT * np.max(s, -1, keepdims=True), -1))))
    keep = min(needed, rank or needed)
    total = np.maximum(np.linalg.norm(s, axis=-1), np.finfo(np.float32).tiny)
    lost = float(np.max(np.linalg.norm(s[..., keep:], axis=-1) / total)) if keep < needed else 0.0
    root = np.sqrt(s[..., :keep])
    return u[..., :keep] * root[..., None, :], root[..., :, None] * vt[..., :keep, :], lost


def _pair(variant: Variant, adapter: Any, w: Any) -> tuple[jax.Array, jax.Array] | None:
    """a and b with every scale in b; None where the weight itself is scaled."""
    found = variant.factors(adapter, w)
    if found.g is not None or found.g_in is not None or found.a is None or found.b is None:
        return None
    folded = found.folded()
    assert folded.a is not None and folded.b is not None
    return folded.a, folded.b if folded.s is None else folded.s * folded.b
