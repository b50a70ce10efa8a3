"""EVA: LoRA that starts along the directions of most variance of its inputs (arXiv 2410.07170)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.core.adapt import Adapt
from lorajax.core.variant import Seen, Statistic, Variant
from lorajax.variants.initializer import Initializer, peaks


class Spectrum(NamedTuple):
    """An incremental SVD of a weight's inputs. components: (in, k), orthonormal columns; values: (k,), descending.
    scatter: (), the sum of all squares; mean: (in,) of the rows, rows: () how many; settled: () bool; keep: () int32,
    how many components this matrix may use."""

    components: jax.Array
    values: jax.Array
    scatter: jax.Array
    mean: jax.Array
    rows: jax.Array
    settled: jax.Array
    keep: jax.Array


@dataclass(frozen=True)
class EVA(Initializer):
    """A = the first r right singular vectors of the inputs X (tokens, in), by an incremental SVD over batches
    (arXiv 2410.07170); B = 0 and W is left alone. Work: `LoRA(initializer=EVA(...))` with
    `lorajax.calibrate`, and `redistribute` to move ranks to where they explain most variance (the paper does).

    rho: up to ceil(rho r) components are followed, and a weight may get as many ranks (2.0; 1.0: no redistribution).
    tau: a weight's stream has converged when each component's cosine with its predecessor is at least this (0.99).
    center: take the mean of X off first. False is the SVD of the paper's text; the released code's incremental PCA has
    True.
    whiten: divide A's columns by the square roots of their singular values (released option).
    adjust: scale alpha with the new rank, so that s is what it was (released default).
    """

    rho: float = 2.0
    tau: float = 0.99
    center: bool = False
    whiten: bool = False
    adjust: bool = True

    def statistic(self, rank: int) -> Statistic:
        """The incremental SVD."""

        def init(n_in: int, n_out: int) -> Spectrum:
            k, zero = min(math.ceil(self.rho * rank), n_in), jnp.zeros(())
            return Spectrum(jnp.zeros((n_in, k)), jnp.zeros(k), zero, jnp.zeros(n_in), zero, jnp.bool_(False),
                            jnp.int32(k))

        return Statistic("inputs", init, self._update, done=lambda state: state.settled)

    def _update(self, state: Spectrum, seen: Seen) -> Spectrum:
        """The SVD of [S V^T; X], from V S^2 V^T + X^T X, truncated to k components."""
        v, gram, n = state.components, seen.gram, seen.rows
        both = state.rows + n
        mean = seen.total / jnp.maximum(n, 1.0)
        if self.center:  # about the mean of all rows: the batch's own scatter and the shift between the two means
            shift = state.mean - mean
            gram = gram - n * jnp.outer(mean, mean) + state.rows * n / jnp.maximum(both, 1.0) * jnp.outer(shift, shift)
        values, vectors = jnp.linalg.eigh((v * jnp.square(state.values)[None, :]) @ v.T + gram)
        k = state.values.shape[0]
        values, vectors = jnp.sqrt(jnp.maximum(values[::-1][:k], 0.0)), vectors[:, ::-1][:, :k]
        vectors = vectors * peaks(vectors)[None, :]
        same = jnp.all(jnp.abs(jnp.sum(v * vectors, axis=0)) >= self.tau)  # all zero before the first batch
        mean = (state.rows * state.mean + seen.total) / jnp.maximum(both, 1.0)
        return Spectrum(vectors, values, state.scatter + jnp.trace(gram), mean, both, same, state.keep)

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        """A = the first components in `stats`, zero beyond those that this matrix may use; B = 0."""
        a = stats.components[:, :rank]
        if self.whiten:
            a = a / jnp.sqrt(jnp.maximum(stats.values[:rank], 1e-12))[None, :]
        return jnp.where((jnp.arange(rank) < stats.keep)[None, :], a, 0.0), jnp.zeros((rank, w.shape[1]))

    def check(self, rank: int, n_in: int, n_out: int) -> None:
        """Raises ValueError for rho below 1 and tau outside [0, 1]."""
        if self.rho < 1.0 or not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"rho={self.rho} must be at least 1 (no redistribution) and tau={self.tau} in 0..1")


def redistribute(adapted: Adapt, stats: Mapping[str, Any]) -> tuple[Adapt, dict[str, Any]]:
    """Gives every weight with EVA the ranks that its components earn: (Adapt, stats) for `init`.

    The explained-variance ratios of all candidate components (ceil(rho r), at most min(in, out)) are sorted, and as
    many kept as there were ranks. A weight's rank is the number of its kept components; one with none loses its
    adapter. The layers of a stacked weight have one array: it gets the largest of their ranks, and columns of A beyond
    a layer's own rank are zero, hence never move (B = 0). Needs concrete arrays: call it outside of jit.
    """
    ratios, budget = {}, 0
    for path, choice in adapted.plan.items():
        lora: Any = choice.inner if isinstance(choice, Variant) else None
        if isinstance(start := getattr(lora, "initial", None), EVA):
            site, state = adapted.sites[path], stats[path]
            most = min(math.ceil(start.rho * lora.rank), site.n_in, site.n_out)
            scatter = np.maximum(np.asarray(state.scatter, np.float64), 1e-30)
            ratios[path] = np.square(np.float64(state.values[..., :most])) / scatter[..., None]
            budget += lora.rank * ratios[path].size // most
    if not ratios:
        return adapted, dict(stats)
    pool = np.concatenate([ratio.ravel() for ratio in ratios.values()])
    kept = np.zeros(pool.shape, bool)
    kept[np.argsort(-pool, kind="stable")[:budget]] = True
    chosen, new = dict(adapted.chosen), dict(stats)
    for path, mine in zip(ratios, np.split(kept, np.cumsum([r.size for r in ratios.values()])[:-1]), strict=True):
        count = mine.reshape(ratios[path].shape).sum(-1)
        whole: Any = chosen[path].choice
        old = whole.inner
        if not (rank := int(count.max())):
            del chosen[path]
            continue
        share = rank / old.rank
        alpha = old.alpha * (math.sqrt(share) if old.rslora else share) if old.initial.adjust else old.alpha
        lora = replace(old, rank=rank, alpha=alpha)
        chosen[path] = chosen[path]._replace(choice=lora if old is whole else replace(whole, of=lora))
        new[path] = stats[path]._replace(keep=jnp.asarray(count, jnp.int32))
    return replace(adapted, chosen=chosen), new
