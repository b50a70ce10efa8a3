"""Per-layer parameter trees (`layer_0`, `layer_1`, ...) to one stacked tree (`layers`, leading layer axis) and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def stack_layers(variables: Mapping[str, Any]) -> dict[str, Any]:
    """`{'params': {'layer_0': ..., 'layer_1': ...}}` -> `{'params': {'layers': ...}}` with leaves (L, ...).

    The other subtrees are kept as they are. Pure; works under jit.
    Errors: ValueError if there is no `layer_0`, or if the layers are not numbered 0..L-1.
    """
    params = dict(variables["params"])
    found = sorted(name for name in params if name.removeprefix("layer_").isdecimal())
    expected = [f"layer_{i}" for i in range(len(found))]
    if not found or set(found) != set(expected):
        raise ValueError(f"to stack, params must hold layer_0 .. layer_(L-1); it holds {sorted(params)}")
    layers = [params.pop(name) for name in expected]
    params["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return {**variables, "params": params}


def unstack_layers(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `stack_layers`: leaves (L, ...) of `layers` become leaves (...) of `layer_0` .. `layer_(L-1)`.

    Errors: ValueError if there is no `layers`, or if its leaves differ in their first dimension.
    """
    params = dict(variables["params"])
    if "layers" not in params:
        raise ValueError(f"to unstack, params must hold 'layers'; it holds {sorted(params)}")
    layers = params.pop("layers")
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(layers)}
    if len(lengths) != 1:
        raise ValueError(f"leaves of 'layers' have different numbers of layers: {sorted(lengths)}")
    for i in range(lengths.pop()):
        params[f"layer_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
    return {**variables, "params": params}
