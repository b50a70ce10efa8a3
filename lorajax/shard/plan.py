"""What a training step takes of each device, from shapes alone: nothing is allocated, and no device is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lorajax.core.adapt import Adapt
from lorajax.core.liveness import size
from lorajax.core.sites import Site
from lorajax.core.variant import Full
from lorajax.shard.follow import adapter_specs, state_specs
from lorajax.shard.rules import Rule, specs, ways


def held(tree: Any, places: Any, sizes: Mapping[str, int]) -> int:
    """Bytes of a tree of shapes on one device, by a tree of PartitionSpecs."""
    leaves = jax.tree.leaves(places, is_leaf=lambda x: isinstance(x, PartitionSpec))
    return sum(size(x) // math.prod(ways(entry, sizes) for entry in spec)
               for x, spec in zip(jax.tree.leaves(tree), leaves, strict=True))


def resident(adapt: Adapt, sizes: Mapping[str, int], rules: Sequence[Rule], defaults: Sequence[Rule],
             opt_state: Any) -> dict[str, int]:
    """Bytes on each device of what stays from step to step, and of the gradients. opt_state: shapes of `tx.init`."""
    base = specs(adapt.sites.leaves, sizes, rules, defaults)
    trainable, frozen = adapt.shapes
    of_trainable, of_frozen = adapter_specs(adapt, base, sizes)
    own = held(trainable, of_trainable, sizes)
    return {
        "base": held(frozen.base, of_frozen.base, sizes),
        "adapters": own + held((frozen.aux, frozen.shared), (of_frozen.aux, of_frozen.shared), sizes),
        "gradients": own,
        "optimizer": held(opt_state, state_specs(opt_state, trainable, of_trainable), sizes),
    }


def gathered(adapt: Adapt, sizes: Mapping[str, int], rules: Sequence[Rule], defaults: Sequence[Rule]) -> int:
    """Bytes of the layers that FSDP has gathered at a time, on each device: the one in use and the one that comes."""
    if sizes.get("fsdp", 1) == 1:
        return 0
    base = specs(adapt.sites.leaves, sizes, rules, defaults)
    layers: dict[str, int] = {}
    for path, site in adapt.sites.items():
        if not _multiplies(site):  # a lookup takes its rows from where they are
            continue
        parts = math.prod(ways(tuple(a for a in _names(e) if a != "fsdp"), sizes) for e in base[path])
        name = "/".join(part for part in path.split("/") if part.startswith("layer")) or path
        layers[name] = layers.get(name, 0) + size(site) // parts // math.prod(site.stack_shape)
    return 2 * max(layers.values(), default=0)


def flops(adapt: Adapt, tokens: int, again: bool = False) -> float:
    """Matrix products of one step over `tokens` tokens, without attention's own: forward, the gradients of the
    activations, and the adapters' (of a trained weight, its gradient too). again: the forward pass is repeated."""
    total = 0.0
    for path, site in adapt.sites.items():
        if _multiplies(site):
            trained = isinstance(adapt.plan.get(path), Full)
            total += 2.0 * tokens * math.prod(site.shape) * (2 + trained + again)
    extra = [x for path, arrays in adapt.shapes[0].items() if path in adapt.sites
             and not isinstance(adapt.plan[path], Full) for x in jax.tree.leaves(arrays)]
    return total + sum(2.0 * tokens * math.prod(x.shape) * (3 + again) for x in extra if len(x.shape) > 1)


def _multiplies(site: Site) -> bool:
    """Whether a product reads it; of a tied table the logits do."""
    return any(use.op == "matmul" for use in site.uses)


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
