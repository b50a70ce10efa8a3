"""What data-driven starts read: the inputs of each weight, or its gradient, in a stream over batches.

A weight's inputs never leave the model: a term that changes nothing is bound to it, and the term's gradient is X^T X
(`Term.tap`). So models stay as they are, stacked and rematerialised layers included, and memory is (in, in) per weight,
however many tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.core.adapt import Adapt, blank
from lorajax.core.bound import RANK, Bound, Factor, Term
from lorajax.core.layout import matrix, nameless, over_stack
from lorajax.core.packed import unpacked
from lorajax.core.sites import Site, by_path
from lorajax.core.variant import Seen, Variant


def calibrate(adapt: Adapt, loss: Callable[[Any, Any], jax.Array], params: Any, batches: Iterable[Any], *,
              mask: Callable[[Any], jax.Array] | None = None, at_once: int | None = None) -> dict[str, Any]:
    """path -> statistic of every weight whose variant reads data (`Variant.statistic`): `stats` for `adapt.init`.

    loss: (params, batch) -> scalar that every such weight contributes to, made with `lorajax.lift`; for a start that
      reads inputs only, its value does not matter. batches: all of one shape, or few shapes (each compiles once).
    mask: batch -> (batch, length) or the like, 0 for padding: leading dimensions of the inputs. None: all rows count.
    at_once: how many weights to collect at a time, each group in a pass of its own over `batches` (then a sequence).
      Memory is one (in, in), for gradients (in, out), array for each of them.

    A start that has converged on all of its weights (EVA's tau) ends its stream early. Raises ValueError for weights
    that are no matmul, for batches that are empty, and where the loss does not depend on a weight.
    """
    wanted = {path: c for path, c in adapt.plan.items() if isinstance(c, Variant) and c.statistic
              and c.statistic.of != "quantization"}
    kinds = {path: c.statistic.of for path, c in wanted.items() if c.statistic}
    for path in wanted:
        if kinds[path] == "inputs" and {use.op for use in adapt.sites[path].uses} != {"matmul"}:
            raise ValueError(f"{path} is a {adapt.sites[path].op}, and only a matmul's inputs can be collected: "
                             f"give this path an initializer that reads no inputs by a rule of its own")
    if at_once is not None and not isinstance(batches, (list, tuple)):
        batches = list(batches)
    leaves = by_path(params)[0]
    paths: list[str] = list(wanted)
    stats: dict[str, Any] = {}
    for i in range(0, len(paths), at_once or max(len(paths), 1)):
        group = {path: wanted[path] for path in paths[i:i + (at_once or len(paths))]}
        stats |= _stream(adapt, group, loss, leaves, batches, mask)
    return stats


def _stream(adapt: Adapt, group: Mapping[str, Any], loss: Any, leaves: Mapping[str, Any], batches: Iterable[Any],
            mask: Any) -> dict[str, Any]:
    """The statistics of a group of weights, in one pass."""
    sites = {path: adapt.sites[path] for path in group}
    state = {path: _start(choice, nameless(sites[path])) for path, choice in group.items()}
    open_ = set(group)

    @jax.jit
    def look(leaves: Any, batch: Any) -> dict[str, Any]:
        seen = None if mask is None else Factor(mask(batch).astype(jnp.float32), ())
        taps = {path: _zeros(site) for path, site in sites.items() if group[path].statistic.of == "inputs"}
        read = {path: unpacked(leaves[path]) for path in group if path not in taps}

        def run(read: Any, taps: Any) -> jax.Array:
            full = {**leaves, **read}
            for path, zeros in taps.items():
                tap = Factor(zeros, (*sites[path].stack_axes, *sites[path].in_axes, RANK))
                full[path] = Bound(full[path], (Term(tap=tap, seen=seen),), path)
            return loss(jax.tree.unflatten(adapt.sites.tree, [full[path] for path in adapt.sites.leaves]), batch)

        gradients, found = jax.grad(run, argnums=(0, 1))(read, taps)
        return {**{path: matrix(sites[path], g).astype(jnp.float32) for path, g in gradients.items()},
                **{path: _seen(sites[path], x) for path, x in found.items()}}

    first = True
    for batch in batches:
        found = look(leaves, batch)
        missed = [path for path, x in found.items() if first and not np.any(x.rows if isinstance(x, Seen) else x)]
        if missed:
            raise ValueError(f"the loss does not depend on {missed[0]!r} (and {len(missed) - 1} other paths) in a way "
                             f"that shows its inputs: it must be made with lift, of all outputs, without stop_gradient")
        first = False
        for path in sorted(open_):
            state[path], done = _update(group[path], nameless(sites[path]), state[path], found[path])
            if done:
                open_.discard(path)
        if not open_:
            break
    if first:
        raise ValueError("no batches: a start that reads data needs at least one")
    return state


def _zeros(site: Site) -> jax.Array:
    shape = [site.shape[i] for i in (*site.stack_axes, *site.in_axes)]
    return jnp.zeros((*shape, site.n_in + 3))


def _seen(site: Site, x: jax.Array) -> Seen:
    """A tap's gradient, taken apart."""
    x = x.reshape(*site.stack_shape, site.n_in, site.n_in + 3)
    return Seen(x[..., :-3], x[..., -3], x[..., 0, -2], x[..., 0, -1])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(choice: Variant, site: Site) -> Any:
    statistic: Any = choice.statistic
    return jax.tree.map(lambda like, x: jnp.broadcast_to(x, like.shape), blank(site, statistic),
                        statistic.init(site.n_in, site.n_out))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(choice: Variant, site: Site, state: Any, seen: Any) -> tuple[Any, jax.Array]:
    """(state, whether all matrices of the site are done); those that are done stay as they are."""
    statistic: Any = choice.statistic

    def one(state: Any, seen: Any) -> tuple[Any, jax.Array]:
        with jax.default_matmul_precision("highest"):
            new = statistic.update(state, seen)
        if statistic.done is None:
            return new, jnp.bool_(False)
        done = statistic.done(state)
        new = jax.tree.map(lambda old, x: jnp.where(done, old, x), state, new)
        return new, statistic.done(new)

    new, done = over_stack(site, one)(state, seen)
    return new, jnp.all(done)
