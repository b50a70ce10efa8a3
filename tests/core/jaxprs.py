"""Reading jaxprs: all equations, however deep, and the arrays that low-rank programs must not contain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from .case import Weight

COMPUTE = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general", "add", "add_any", "sub",
                     "scatter-add", "reduce_sum"})
"""What can form W + AB, AB or the gradient of W. Layout, casts and multiples of the frozen W are none of these."""


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a (closed) jaxpr and of the jaxprs in its parameters."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def shapes(jaxpr: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(primitive, shape) of every result of every equation."""
    for eqn in equations(jaxpr):
        for var in eqn.outvars:
            if hasattr(var.aval, "shape"):
                yield eqn.primitive.name, tuple(var.aval.shape)


def squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    """The sizes of a shape in ascending order, ones left out: equal for a weight, its transpose and w[None]."""
    return tuple(sorted(size for size in shape if size != 1))


def forbidden(weights: Mapping[str, Weight], flat: Mapping[str, Any]) -> set[tuple[int, ...]]:
    """Squeezed shapes of the weights: as they are, per layer, and as (in, out) matrices."""
    out = set()
    for path, weight in weights.items():
        shape = flat[path].shape
        n_in, n_out = (math.prod(shape[i] for i in axes) for axes in (weight.in_axes, weight.out_axes))
        stack = [shape[i] for i in weight.stack_axes]
        inner = [shape[i] for i in weight.in_axes + weight.out_axes]
        for k in range(len(stack) + 1):
            out |= {squeezed([*stack[k:], *inner]), squeezed([*stack[k:], n_in, n_out])}
    return out


def weight_shaped(jaxpr: Any, weights: Mapping[str, Weight], flat: Mapping[str, Any]) -> list[str]:
    """`primitive shape` of every computed array as large as a weight: W + AB, AB, or dL/dW."""
    dense = forbidden(weights, flat)
    return [f"{name} {shape}" for name, shape in shapes(jaxpr) if name in COMPUTE and squeezed(shape) in dense]


def primitives(jaxpr: Any) -> list[str]:
    return [eqn.primitive.name for eqn in equations(jaxpr)]


def trace(fn: Any, *args: Any) -> Any:
    """The jitted function traced: `.jaxpr`, and what `run` takes, from one trace."""
    return jax.jit(fn).trace(*args)


def run(program: Any, *args: Any) -> Any:
    """Compiles a traced program and runs it."""
    return jax.block_until_ready(program.lower().compile()(*args))
