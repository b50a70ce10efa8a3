"""`lift(f)` is `f`, but it accepts bound weights where `f` reads arrays, and never forms W + AB.

`f` is traced to a jaxpr with the dense shapes, then that jaxpr is evaluated with the bound weights. Because only the
traced program matters, the model needs no change and no naming convention.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax

from lorajax.core.bound import Bound, is_bound
from lorajax.core.gated import KERNELS
from lorajax.core.interpret import Interpreter
from lorajax.core.packed import is_packed


class MaterialisedWeight(UserWarning):
    """A bound weight met an operation that has no factored form; its merged W + AB was used. Correct, but it costs a
    dense weight and its gradient. `lift(f, strict=True)` raises `StrictLiftError` instead."""


class StrictLiftError(RuntimeError):
    """`lift(f, strict=True)` met an operation that needs a merged weight."""


def lift(fn: Callable[..., Any], *, strict: bool = False, once: str = "", kernels: str = "") -> Callable[..., Any]:
    """`fn` with bound weights allowed anywhere in its arguments; with none it is `fn` itself.

    The result composes with jit, grad, vmap, checkpoint and meshes. Each un-jitted call traces `fn` anew, so call it
    under `jax.jit`. An operation on a weight that has no factored form (a weight squared, a custom derivative) uses
    the merged weight of that operand alone, and warns `MaterialisedWeight` once per call, path and operation.

    strict: raise `StrictLiftError` instead of warning. once: a regular expression; a layer of which nothing is kept for
    the backward pass (`remat='full'`) dequantises quantised weights whose path it matches once for its recomputation
    and its backward pass, in place of once for each: quicker, at the memory of their dense form in one layer
    (`lorajax.core.layerwise`). ".*" is every weight, "" none. kernels: 'triton' adds the updates of both sides of
    silu(x W1) * (x W2) where they are read, in one kernel, in 16 bits where JAX's default device is an NVIDIA GPU, for
    which the program has to be (`lorajax.core.gated_kernel`); not for arrays that are split over a mesh, which the
    compiler would gather. It has no forward-mode and no second derivative. 'interpret' runs it in Pallas's interpreter,
    '' never. Raises ValueError for what is no regular expression and for other kernels.
    """

    try:
        re.compile(once)
    except re.error as error:
        raise ValueError(f"once={once!r} is not a regular expression on the paths of weights ({error}): '.*' is every "
                         f"weight, '' none") from None
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r} is unknown; there are {', '.join(map(repr, KERNELS))}")

    @functools.wraps(fn)
    def lifted(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda x: is_bound(x) or is_packed(x))
        leaves = [Bound(x, (), "a weight without an adapter") if is_packed(x) else x for x in leaves]
        slots = [i for i, leaf in enumerate(leaves) if is_bound(leaf)]
        if not slots:
            return fn(*args, **kwargs)

        def dense(*weights):
            filled = list(leaves)
            for slot, weight in zip(slots, weights, strict=True):
                filled[slot] = weight
            args, kwargs = jax.tree.unflatten(tree, filled)
            return fn(*args, **kwargs)

        jaxpr, shapes = jax.make_jaxpr(dense, return_shape=True)(*[_like(leaves[i].w) for i in slots])

        def report(*place: str) -> None:
            path, operation, line, why = place
            text = f"{path}: merged W + AB for `{operation}` ({why}) at {line}"
            if strict:
                raise StrictLiftError(f"{text}. Leave this path out of the rules, or lift without strict=True")
            if place not in told:
                told.add(place)
                warnings.warn(text, MaterialisedWeight, stacklevel=2)

        told: set[tuple[str, ...]] = set()
        run = Interpreter(report, once, kernels)
        results = run.closed(jaxpr, [leaves[i] for i in slots])
        results = [run.merge(r, None, "what a function returns is arrays") for r in results]
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return lifted


def _like(w: Any) -> Any:
    """What the function is traced with in a weight's place."""
    return jax.ShapeDtypeStruct(w.shape, w.dtype) if is_packed(w) else w
