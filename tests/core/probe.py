"""The variant of these tests and what it means, written a second time.

`Probe` is LoRA with both factors random, so that every adapter changes the output. `merged` derives W + s A B from the
axes of the table of models: the reference that neither `merge` nor `lift` had a hand in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.core.variant import Factors, Leaf, Variant

from .case import Weight


class ProbeAdapter(NamedTuple):
    a: jax.Array
    b: jax.Array


@dataclass(frozen=True)
class Probe(Variant):
    """A: normals / sqrt(in), B: normals / 2."""

    rank: int = 3
    scale: float = 0.5
    dropout: float = 0.0

    leaves: ClassVar[Mapping[str, Leaf]] = {"a": Leaf("a", ("in", "rank")), "b": Leaf("b", ("rank", "out"))}

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[ProbeAdapter, jax.Array]:
        key_a, key_b = jax.random.split(key)
        a = jax.random.normal(key_a, (w.shape[0], self.rank)) / math.sqrt(w.shape[0])
        return ProbeAdapter(a, jax.random.normal(key_b, (self.rank, w.shape[1])) / 2), w

    def factors(self, adapter: ProbeAdapter, w: jax.Array) -> Factors:
        return Factors(adapter.a, adapter.b * self.scale)


def rules(weights: Mapping[str, Weight] | list[str], variant: Variant | None = None) -> list[tuple[str, Variant]]:
    """One rule per weight, its path taken literally."""
    return [(re.escape(path), variant or Probe()) for path in weights]


def adapters(weights: Mapping[str, Weight], params: Any, rank: int = 3, seed: int = 0) -> dict[str, ProbeAdapter]:
    """Random adapters of the shapes the contract states, (stack..., in, r) and (stack..., r, out), without the core."""
    flat = leaves(params)
    out = {}
    for i, (path, weight) in enumerate(weights.items()):
        stack, n_in, n_out = sizes(weight, flat[path].shape)
        rng = np.random.default_rng([seed, i])
        a = rng.standard_normal((*stack, n_in, rank)) / math.sqrt(n_in)
        b = rng.standard_normal((*stack, rank, n_out)) / 2
        out[path] = ProbeAdapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    return out


def name(keys: Any) -> str:
    """The keys of a leaf joined by '/'; the `value` of a Flax box or variable is not part of the name."""
    words = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))) for key in keys]
    return "/".join(words[:-1] if words[-1] == "value" and not hasattr(keys[-1], "key") else words)


def init(adapt: Any, params: Any, seed: int = 1) -> tuple[dict[str, Any], Any]:
    """(trainable, frozen) in one quickly compiled program."""
    return jax.jit(adapt.init)(jax.random.key(seed), params)


def leaves(tree: Any) -> dict[str, Any]:
    """Path -> leaf."""
    return {name(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def replace(tree: Any, new: Mapping[str, Any]) -> Any:
    """`tree` with the leaves at the paths of `new` replaced."""
    assert set(new) <= set(leaves(tree)), set(new) - set(leaves(tree))
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: new.get(name(keys), leaf), tree)


def sizes(weight: Weight, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """(stack dims), in, out of a weight of this shape."""
    assert sorted(weight.stack_axes + weight.in_axes + weight.out_axes) == list(range(len(shape)))
    return (tuple(shape[i] for i in weight.stack_axes), math.prod(shape[i] for i in weight.in_axes),
            math.prod(shape[i] for i in weight.out_axes))


def delta(weight: Weight, shape: tuple[int, ...], a: Any, b: Any, scale: float = 0.5) -> Any:
    """s A B in the layout of the weight; NumPy arrays in, NumPy array out."""
    order = weight.stack_axes + weight.in_axes + weight.out_axes
    return (scale * (a @ b)).reshape([shape[i] for i in order]).transpose(np.argsort(order).tolist())


def merged(weights: Mapping[str, Weight], params: Any, trainable: Mapping[str, Any], scale: float = 0.5) -> Any:
    """The parameters with every W replaced by W + s A B."""
    flat = leaves(params)
    new = {}
    for path, weight in weights.items():
        w, update = flat[path], delta(weight, flat[path].shape, *trainable[path], scale=scale)
        new[path] = (w.astype(update.dtype) + update).astype(w.dtype)
    return replace(params, new)


def error(got: Any, want: Any) -> float:
    """Largest absolute difference of any leaf over the largest magnitude in the reference leaf (float64)."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    worst = 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.shape == y.shape, (x.shape, y.shape)
        x, y = np.asarray(x).astype(np.float64), np.asarray(y).astype(np.float64)
        if y.size:
            assert np.isfinite(y).all()
            worst = max(worst, float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)))
    return worst
