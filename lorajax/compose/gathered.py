"""Trained adapters of one base, side by side: checked to belong together, as factors, read one matrix at a time.

Composing is host work: NumPy, one matrix at a time, nothing compiled. Only weights may be traced (`blended`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.compose.plain import Plain, as_lora
from lorajax.core.adapt import Adapt, Frozen, fold
from lorajax.core.fingerprint import fingerprint
from lorajax.core.sites import Site, Sites, by_path
from lorajax.core.variant import Full
from lorajax.variants.lora import LoRA


class Trained(Protocol):
    """An adapter: what `adapt` decided, and the two partitions after training. `Earlier`, `Plain`, `Composed` are."""

    @property
    def adapt(self) -> Adapt: ...
    @property
    def trainable(self) -> Any: ...
    @property
    def frozen(self) -> Frozen: ...


class Adapter(NamedTuple):
    """A trained adapter by its three parts."""

    adapt: Adapt
    trainable: Any
    frozen: Frozen


class Pair(NamedTuple):
    """The update a b of one matrix; every scale is in b. a: (in, r), b: (r, out), float32. s: LoRA's scale, which b
    contains; 1 for other variants. Only methods that treat A and B apart read it."""

    a: Any
    b: Any
    s: float = 1.0

    @property
    def delta(self) -> np.ndarray:
        """(in, out)."""
        return self.a @ self.b


class Part(NamedTuple):
    """One matrix as a method sees it.

    path, at: which of the site's stack. members: which adapters have it. weights: (members,). pairs: their updates
    from the ORIGINAL base. key: of this matrix, None if the caller gave none. taus: what takes the place of the dense
    updates, (members, in, out'), where a method hands its own on to another.
    """

    path: str
    at: int
    members: tuple[int, ...]
    weights: Any
    pairs: tuple[Pair, ...]
    key: jax.Array | None = None
    taus: np.ndarray | None = None

    def deltas(self) -> np.ndarray:
        """(members, in, out): the only place where dense updates are formed, of one matrix."""
        return np.stack([pair.delta for pair in self.pairs]) if self.taus is None else self.taus


class Gathered(NamedTuple):
    """plains: every adapter as LoRA of scale 1. base: path -> the original weight, of all leaves that are known.
    scales: of each adapter, path -> LoRA's own scale."""

    sites: Sites
    plains: tuple[Plain, ...]
    base: dict[str, jax.Array]
    scales: tuple[dict[str, float], ...]

    @property
    def paths(self) -> list[str]:
        """The sites that at least one adapter adapts, in tree order."""
        return [path for path in self.sites if any(self.has(i, path) for i in range(len(self.plains)))]

    def has(self, i: int, path: str) -> bool:
        choice = self.plains[i].adapt.plan.get(path)
        return choice is not None and not isinstance(choice, Full)

    def parts(self, weights: Any, key: jax.Array | None = None, paths: Sequence[str] | None = None) -> Iterator[Part]:
        """Every matrix in turn."""
        for path in self.paths if paths is None else paths:
            members = tuple(i for i in range(len(self.plains)) if self.has(i, path))
            own = weights[np.asarray(members)]
            flat = [[np.asarray(x).reshape(-1, *x.shape[-2:]) for x in self.plains[i].trainable[path]] for i in members]
            for index in range(len(flat[0][0])):
                pairs = tuple(Pair(x[0][index], x[1][index], self.scales[i].get(path, 1.0))
                              for i, x in zip(members, flat, strict=True))
                part = None if key is None else jax.random.fold_in(fold(key, path), index)
                yield Part(path, index, members, own, pairs, part)


def gather(adapters: Sequence[Trained], params: Any = None) -> Gathered:
    """Adapters of one base, whatever their variants, scales, ranks and targets.

    params: the original base, needed only where no adapter has a weight as it was (all trained it in full).
    Raises ValueError for none, for adapters of other models or of another base (by fingerprint of the weights that
    both left as they were), and for one that weighs tokens apart.
    """
    if not adapters:
        raise ValueError("no adapters were given: give a list with at least one")
    for i, one in enumerate(adapters):
        if not isinstance(getattr(one, "adapt", None), Adapt):
            raise ValueError(f"adapters[{i}] is a {type(one).__name__}; an adapter has adapt, trainable and frozen: "
                             f"compose.Adapter(adapt, trainable, frozen)")
    sites = adapters[0].adapt.sites
    for i, one in enumerate(adapters[1:], 1):
        _same_model(sites, one.adapt.sites, i)
    known = {} if params is None else by_path(params)[0]
    kept = [known] if known else []
    kept += [{path: w for path, w in one.frozen.base.items() if not _rewritten(one.adapt, path)} for one in adapters]
    for i, mine in enumerate(kept[1:], 1):
        _same_base(kept[0], mine, "params" if known else "adapters[0]", i - 1 if known else i)
    plains = tuple(as_lora(one.adapt, one.trainable, one.frozen) for one in adapters)
    base: dict[str, jax.Array] = {}
    for found in (*(plain.frozen.base for plain in reversed(plains)), *reversed(kept)):
        base |= found
    scales = tuple({path: float(choice.scale) for path, choice in one.adapt.plan.items()
                    if isinstance(choice, LoRA) and choice.scale} for one in adapters)
    return Gathered(sites, plains, {path: base[path] for path in sites.leaves if path in base}, scales)


def weighted(weights: Any, count: int) -> Any:
    """(count,) float32; None for ones. ValueError for another number of them, or one that is not finite."""
    if weights is None:
        return np.ones(count, np.float32)
    array = weights if isinstance(weights, jax.core.Tracer) else np.asarray(weights, np.float32)
    if array.shape != (count,):
        raise ValueError(f"weights have shape {array.shape} for {count} adapters: give one number for each")
    if isinstance(array, np.ndarray) and not np.isfinite(array).all():
        raise ValueError(f"weights are {np.asarray(array).tolist()}: every one must be finite")
    return array


def stacked(site: Site, pairs: Sequence[Pair]) -> tuple[jax.Array, jax.Array]:
    """The matrices of a site, (stack..., in, r) and (stack..., r, out); smaller ranks are filled up with zeros."""
    rank = max(pair.a.shape[-1] for pair in pairs)
    xp = library(*pairs[0][:2])
    a = xp.stack([xp.pad(p.a, ((0, 0), (0, rank - p.a.shape[-1]))) for p in pairs])
    b = xp.stack([xp.pad(p.b, ((0, rank - p.b.shape[0]), (0, 0))) for p in pairs])
    a, b = (x.reshape(*site.stack_shape, *x.shape[1:]) for x in (a, b))
    return jnp.asarray(a), jnp.asarray(b)


def library(*arrays: Any) -> Any:
    """NumPy, or jax.numpy where one of the arrays is JAX's, traced or not."""
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def _rewritten(adapt: Adapt, path: str) -> bool:
    choice = adapt.plan.get(path)
    return choice is not None and not isinstance(choice, Full) and choice.rewrites_weight


def _same_model(ours: Sites, theirs: Sites, i: int) -> None:
    if ours.leaves == theirs.leaves:
        return
    here, there = ours.leaves.keys(), theirs.leaves.keys()
    missing, extra = sorted(here - there), sorted(there - here)
    if missing or extra:
        raise ValueError(f"adapters[{i}] belongs to another model than adapters[0]: it has no {missing[:2]}, and has "
                         f"{extra[:2]}")
    path = next(path for path, leaf in ours.leaves.items() if theirs.leaves[path] != leaf)
    raise ValueError(f"adapters[{i}] belongs to another model than adapters[0]: {path} is {theirs.leaves[path].shape} "
                     f"{theirs.leaves[path].dtype} there, {ours.leaves[path].shape} {ours.leaves[path].dtype} here")


def _same_base(ours: dict[str, Any], theirs: dict[str, Any], name: str, i: int) -> None:
    """Arrays that are one object need no reading."""
    common = [path for path in ours if path in theirs and theirs[path] is not ours[path]]
    for path in common:
        if fingerprint({path: ours[path]}) != fingerprint({path: theirs[path]}):
            raise ValueError(f"adapters[{i}] was trained on another base than {name}: {path} differs, fingerprint "
                             f"{fingerprint({path: theirs[path]})} there and {fingerprint({path: ours[path]})} here. "
                             f"Updates add up on one base only")
