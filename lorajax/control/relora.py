"""ReLoRA: every so often A B is merged into a float32 copy of the weight and starts anew (arXiv 2307.05695)."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.control.controller import Controller, Restart
from lorajax.core.layout import leaf, over_stack
from lorajax.core.variant import Full, FullAdapter
from lorajax.variants.lora import LoRA

STARTS = ("kaiming", "gaussian", "orthogonal", "embedding")
"""LoRA's starts with A B = 0, from which a restart can go on."""


class ReLoRAState(NamedTuple):
    """restarts: () int32, how many there were. moved: site path -> the sum of all updates merged so far, float32, in
    the weight's own shape. It belongs to the run: the base itself never changes."""

    restarts: jax.Array
    moved: dict[str, jax.Array]


def relora(adapt: Any, *, total_steps: int, every: float = 0.25, prune: str = "magnitude", ratio: float = 0.9,
           paired: bool = True, restart_warmup: float = 0.02) -> Controller:
    """The controller whose `restart` acts on the LoRA sites of `adapt`, between steps; other sites go on undisturbed.

    every: steps between restarts, below 1 a share of the run; none follows the last step. restart_warmup: likewise, for
    `lorajax.optim.restart_schedule`, which the caller gives the optimizer. prune, ratio, paired: see `prune_moments`;
    the released code has ``random`` (0.999) and ``magnitude`` (0.8 to 0.9), not paired.
    The paper starts after a short full-rank training, in place of which there is a pretrained model here.
    """
    paths = [path for path, variant in adapt.plan.items() if isinstance(variant, LoRA)]
    if not paths:
        found = sorted({type(variant).__name__ for variant in adapt.plan.values()})
        raise ValueError(f"ReLoRA found no LoRA site; the rules made {', '.join(found) or 'none'}: give at least one "
                         f"path LoRA(...), or use control.identity()")
    for path in paths:
        if adapt.plan[path].initializer not in STARTS:
            raise ValueError(f"{path}: initializer={adapt.plan[path].initializer!r} does not start with A B = 0, so a "
                             f"restart would change the function: use one of {', '.join(STARTS)}")
    steps = round(every * total_steps) if every < 1 else int(every)
    if not 1 <= steps < total_steps:
        raise ValueError(f"every={every} is {steps} steps of a run of {total_steps}: it must be within the run")
    if prune not in ("magnitude", "random"):
        raise ValueError(f"prune={prune!r} is unknown; there are 'magnitude' and 'random'")
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio={ratio} is the share of the moments that is zeroed: it must be in [0, 1]")

    def init(trainable: Any) -> ReLoRAState:
        return ReLoRAState(jnp.int32(0), {path: jnp.zeros(adapt.sites[path].shape, jnp.float32) for path in paths})

    def restart(state: Any) -> Any:
        control = state.control
        key = jax.random.fold_in(jax.random.fold_in(state.key, zlib.crc32(b"relora")), control.restarts)
        fresh, moved = dict(state.trainable), dict(control.moved)
        for i, path in enumerate(paths):
            moved[path] = moved[path] + update_of(adapt, path, state.trainable[path])
            fresh[path] = _start(adapt, path, jax.random.fold_in(key, 2 * i), state.trainable[path])
        pruned = prune_moments(state.opt_state, paths, jax.random.fold_in(key, 1), prune, ratio, paired)
        return state._replace(trainable=fresh, opt_state=pruned, control=ReLoRAState(control.restarts + 1, moved))

    def rebase(frozen: Any, control: ReLoRAState) -> Any:
        base = {path: (frozen.base[path].astype(jnp.float32) + moved).astype(frozen.base[path].dtype)
                for path, moved in control.moved.items()}
        return frozen._replace(base={**frozen.base, **base})

    def whole(trainable: Any, frozen: Any, control: ReLoRAState) -> tuple[dict[str, Any], dict[str, Any]]:
        plan, arrays = dict(adapt.plan), dict(trainable)
        for path in paths:
            weight = frozen.base[path].astype(jnp.float32) + control.moved[path]
            plan[path] = Full()
            arrays[path] = FullAdapter(weight + update_of(adapt, path, trainable[path]))
        return plan, arrays

    return Controller(init=init, masks=lambda state: None, update=lambda grads, old, new, state: (new, state),
                      report=lambda state: {"restarts": int(state.restarts)},
                      restart=Restart(steps, restart, rebase, whole))


def update_of(adapt: Any, path: str, adapter: Any) -> jax.Array:
    """s A B of a site in the shape of its weight, float32."""
    site, variant = adapt.sites[path], adapt.plan[path]
    zeros = jnp.zeros((*site.stack_shape, site.n_in, site.n_out), jnp.float32)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), adapter)
    with jax.default_matmul_precision("highest"):
        return leaf(site, over_stack(site, variant.delta)(wide, zeros))


def prune_moments(opt_state: Any, paths: list[str], key: jax.Array, prune: str, ratio: float,
                  paired: bool = True) -> Any:
    """`opt_state` with a share `ratio` zeroed of every array that stands under a site's path and a factor's name: the
    two moments of AdamW, for A and for B.

    prune: ``magnitude`` zeroes what is at or below the `ratio`-quantile of |x|, matrix by matrix, ``random`` draws.
    paired: an entry of the first moment goes where its second moment goes, too. The released code prunes each for
    itself (False): an entry of which the first moment alone is left is then divided by almost nothing in the next
    steps, which only a long warm-up at a learning rate near 0 survives.
    ValueError if the optimizer keeps nothing there.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(opt_state)
    keep: dict[tuple[Any, ...], jax.Array] = {}
    for keys, x in leaves:
        names = tuple(getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in keys)
        if len(names) < 2 or names[-2] not in paths or names[-1] not in ("A", "B"):
            continue
        if prune == "random":
            keep[names] = jax.random.uniform(jax.random.fold_in(key, len(keep) + 1), x.shape) > ratio
        else:
            size = jnp.abs(x).astype(jnp.float32)
            keep[names] = size > jnp.quantile(size, ratio, axis=(-2, -1), keepdims=True)
    if not keep:
        raise ValueError("this optimizer keeps no moments of A and B that ReLoRA could prune: use 'adamw'")
    pruned = []
    for keys, x in leaves:
        names = tuple(getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in keys)
        on = keep.get(names)
        second = keep.get((*names[:-3], "nu", *names[-2:])) if paired and names[-3:-2] == ("mu",) else None
        on = on if second is None or on is None else on & second
        pruned.append(x if on is None else jnp.where(on, x, jnp.zeros_like(x)))
    return jax.tree.unflatten(tree, pruned)


def _start(adapt: Any, path: str, key: jax.Array, like: Any) -> Any:
    """A new adapter of the site, in the dtypes of `like`."""
    site, variant = adapt.sites[path], adapt.plan[path]
    keys = jax.random.split(key, site.stack_shape) if site.stack_axes else key
    zeros = jnp.zeros((*site.stack_shape, site.n_in, site.n_out), jnp.float32)
    fresh = over_stack(site, lambda k, w: variant.init(k, w)[0])(keys, zeros)
    return jax.tree.map(lambda x, old: x.astype(old.dtype), fresh, like)
