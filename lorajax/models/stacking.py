"""Per-layer parameter trees (`layer_0`, `layer_1`, ...) to one stacked tree (`layers`, leading layer axis) and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def stack_layers(variables: Mapping[str, Any]) -> dict[str, Any]:
    """`{'params': {'layer_0': ..., 'layer_1': ...}}` -> `{'params': {'layers': ...}}` with leaves (L, ...).

    Wherever layers are in the tree (a model may have an encoder's and a decoder's); the other subtrees are kept as they
    are. Pure; works under jit.
    Errors: ValueError if there is no `layer_0`, or if the layers are not numbered 0..L-1.
    """
    done, found = _everywhere(variables, _stack)
    if not found:
        raise ValueError(f"to stack, params must hold layer_0 .. layer_(L-1); it holds {sorted(variables['params'])}")
    return done


def unstack_layers(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `stack_layers`: leaves (L, ...) of `layers` become leaves (...) of `layer_0` .. `layer_(L-1)`.

    Errors: ValueError if there is no `layers`, or if its leaves differ in their first dimension.
    """
    done, found = _everywhere(variables, _unstack)
    if not found:
        raise ValueError(f"to unstack, params must hold 'layers'; it holds {sorted(variables['params'])}")
    return done


def replicate_layers(config: Any, variables: Mapping[str, Any], ranges: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """A deeper model made of ranges [start, end) of a model's layers: (config, variables). Layers of per-layer trees
    are the same arrays as the base's, so they need no memory; stacked ones are copied.

    Errors: ValueError for a range outside the layers, or a tree with layers in other places than under 'params'.
    """
    chosen = [i for start, end in ranges for i in range(start, end)]
    if not chosen or min(chosen) < 0 or max(chosen) >= config.num_layers:
        raise ValueError(f"ranges {list(map(list, ranges))} of a model with {config.num_layers} layers: give pairs "
                         f"[start, end) within 0 and {config.num_layers}")
    params = dict(variables["params"])
    if "layers" in params:
        params["layers"] = jax.tree.map(lambda x: x[jnp.asarray(chosen)], params["layers"])
    elif "layer_0" in params:
        layers = [params.pop(f"layer_{i}") for i in range(config.num_layers)]
        params |= {f"layer_{new}": layers[old] for new, old in enumerate(chosen)}
    else:
        raise ValueError(f"params must hold layer_0 .. or 'layers'; it holds {sorted(params)}")
    windows = getattr(config, "windows", ())
    own = {"windows": tuple(windows[i] for i in chosen)} if windows else {}
    return dataclasses.replace(config, num_layers=len(chosen), **own), {**variables, "params": params}


def _everywhere(tree: Any, change: Callable[[dict[str, Any]], bool]) -> tuple[Any, bool]:
    """A copy of the tree with `change` made in each dictionary, outermost first; whether it changed any."""
    if not isinstance(tree, Mapping):
        return tree, False
    tree = dict(tree)
    if change(tree):
        return tree, True
    below = {name: _everywhere(child, change) for name, child in tree.items()}
    return {name: child for name, (child, _) in below.items()}, any(found for _, found in below.values())


def _stack(tree: dict[str, Any]) -> bool:
    found = [name for name in tree if name.startswith("layer_") and name.removeprefix("layer_").isdecimal()]
    if not found:
        return False
    expected = [f"layer_{i}" for i in range(len(found))]
    if set(found) != set(expected):
        raise ValueError(f"to stack, params must hold layer_0 .. layer_(L-1); it holds {sorted(tree)}")
    layers = [tree.pop(name) for name in expected]
    tree["layers"] = jax.tree.map(_stacked, *layers)
    return True


def _stacked(*leaves: Any) -> Any:
    """Those of a host's memory stay there."""
    return np.stack(leaves) if all(isinstance(x, np.ndarray) for x in leaves) else jnp.stack(leaves)


def _unstack(tree: dict[str, Any]) -> bool:
    if "layers" not in tree:
        return False
    layers = tree.pop("layers")
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(layers)}
    if len(lengths) != 1:
        raise ValueError(f"leaves of 'layers' have different numbers of layers: {sorted(lengths)}")
    for i in range(lengths.pop()):
        tree[f"layer_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
    return True
