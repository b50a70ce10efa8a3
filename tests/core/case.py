"""One row of the table of models: a function, its parameters and arguments, and the weights `sites` must find in it.

Sizes are chosen so that no activation has the shape of a weight, and the probe's rank (3) is no size of any model, nor
that of several weights that read one input: what `jaxprs.weight_shaped` counts is then unambiguous.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Weight(NamedTuple):
    """What `sites` has to say about one weight."""

    in_axes: tuple[int, ...] = (0,)
    out_axes: tuple[int, ...] = (1,)
    stack_axes: tuple[int, ...] = ()
    op: str = "matmul"
    uses: int = 1


class Built(NamedTuple):
    """`fn(params, *args)` returns any pytree; `exact`, if given, is the same function in float32."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    exact: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Case:
    """name, how to build it, the weights it has, and how it departs from the usual.

    fallback: the primitive that forces the merged weight ('' for whichever); None where it has to stay factored.
    places: in how many places of the program that happens, None if that is up to a library.
    differentiable: False for `while_loop`, which JAX itself cannot differentiate in reverse.
    mesh: a function that makes the mesh under which the model runs.
    """

    name: str
    make: Callable[[], Built]
    weights: dict[str, Weight]
    fallback: str | None = None
    places: int | None = 1
    differentiable: bool = True
    mesh: Callable[[], jax.sharding.Mesh] | None = None

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self.mesh()) if self.mesh else contextlib.nullcontext()

    @functools.cached_property
    def built(self) -> Built:
        with self.scope():
            return self.make()


CASES: dict[str, Case] = {}


def case(weights: dict[str, Weight], **kwargs: Any) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Registers the decorated builder under its own name."""

    def register(make: Callable[[], Built]) -> Callable[[], Built]:
        name = make.__name__
        assert name not in CASES, name
        CASES[name] = Case(name, make, weights, **kwargs)
        return make

    return register


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    """Float32 standard normals times `scale`, without compiling anything."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32) * scale)


def fill(shapes: Any, scale: float = 0.4) -> Any:
    """Normals in the place of every ShapeDtypeStruct: parameters of any model, none of them zero."""
    leaves, treedef = jax.tree.flatten(shapes)
    return jax.tree.unflatten(treedef, [normal(*leaf.shape, seed=i, scale=scale) for i, leaf in enumerate(leaves)])
