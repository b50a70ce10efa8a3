"""Between adapters: updates, or magnitudes and directions apart where the adapters are DoRA."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.compose.composed import compose
from lorajax.compose.gathered import Adapter, Pair, Part, Trained, gather, stacked, weighted
from lorajax.compose.svd import join
from lorajax.compose.wholes import Whole
from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.layout import matrix
from lorajax.core.rules import Chosen
from lorajax.variants.dora import SMALLEST, DoRA
from lorajax.variants.lora import LoRA, LoRAAdapter
from lorajax.variants.wrapper import inner_of, joined


def interpolate(adapters: Sequence[Trained], weights: Any, *, full: Whole = None, params: Any = None) -> Adapter:
    """The point ``sum_t w_t`` (adapter t) between adapters of one base, w_t >= 0 with sum 1: each adapter itself where
    its weight is 1.

    ``dW = sum_t w_t dW_t``, exactly and factored, except at sites where every adapter is a DoRA of factors. A DoRA's
    weight is a magnitude m times a direction ``V / ||V||`` per output unit; the mean of two such weights is shorter
    than both wherever their directions differ. There the parts are averaged apart,

        m = sum_t w_t m_t,    V = sum_t w_t V_t / ||V_t||    (V up to a length, which the norm takes away)

    which with ``V_t = W + dV_t`` is ``W + sum_t w_t c_t dV_t / sum_t w_t c_t``, ``c_t = 1 / ||V_t||``: again a DoRA of
    W, of the summed ranks. Raises ValueError for weights that are negative or do not sum to 1.
    """
    w = np.asarray(weights, np.float64)
    if w.shape != (len(adapters),) or (w < 0).any() or abs(w.sum() - 1) > 1e-6:
        raise ValueError(f"weights={w.tolist()} are no point between {len(adapters)} adapters: give one number >= 0 "
                         f"for each, with sum 1 (compose takes any weights)")
    doras = _doras(adapters)
    rest = [Adapter(replace(one.adapt, chosen={p: c for p, c in one.adapt.chosen.items() if p not in doras}),
                    one.trainable, one.frozen) for one in adapters]
    made = compose(rest, weights=w, full=full, params=params, measure=False)
    if not doras:
        return Adapter(made.adapt, made.trainable, made.frozen)
    inner = [Adapter(*_unwrapped(one, doras)) for one in adapters]
    found = gather(inner, params)
    chosen, trained, aux = dict(made.adapt.chosen), dict(made.trainable), {}
    for path in doras:
        site = found.sites[path]
        base = np.asarray(matrix(site, found.base[path]), np.float32).reshape(-1, site.n_in, site.n_out)
        m = np.stack([np.asarray(x.trainable[path].magnitude).reshape(-1, site.n_out) for x in adapters])
        pairs, magnitudes, norms = [], [], []
        for part in found.parts(weighted(w, len(adapters)), None, [path]):
            pair, norm = _direction(base[part.at], part)
            pairs.append(pair)
            norms.append(norm)
            magnitudes.append(np.tensordot(w, m[:, part.at], 1).astype(np.float32))
        a, b = stacked(site, pairs)
        rank = a.shape[-1]
        adapter = joined("DoRAAdapter", LoRAAdapter(a, b), magnitude=_like(site, magnitudes),
                         weight_norm=_like(site, norms))
        chosen[path] = Chosen(DoRA(LoRA(rank=rank, alpha=float(rank))), 0, re.escape(path))
        trained[path] = adapter._replace(weight_norm=None)
        aux[path] = adapter._replace(A=None, B=None, magnitude=None)
    order = [path for path in made.adapt.sites.leaves if path in chosen]
    adapt = replace(made.adapt, chosen={path: chosen[path] for path in order})
    return Adapter(adapt, {path: trained[path] for path in order}, Frozen(made.frozen.base, aux, {}))


def _doras(adapters: Sequence[Trained]) -> list[str]:
    """Sites where all are a DoRA with factors on the weight as it was."""
    plans = [one.adapt.plan for one in adapters]
    return [path for path in plans[0]
            if all(isinstance(c := plan.get(path), DoRA) and c.of is not None and c.factored and not c.rewrites_weight
                   for plan in plans)]


def _unwrapped(one: Trained, paths: Sequence[str]) -> tuple[Adapt, dict[str, Any], Frozen]:
    """The adapter with what DoRA wraps in the place of DoRA, at these sites alone."""
    chosen = {path: one.adapt.chosen[path]._replace(choice=one.adapt.plan[path].inner) for path in paths}  # type: ignore[union-attr]
    trained = {path: inner_of(one.trainable[path]) for path in paths}
    shared = {name: x for name, x in one.trainable.items() if name in one.adapt.slots}
    aux = {path: inner_of(one.frozen.aux[path]) for path in paths if path in one.frozen.aux}
    return Adapt(one.adapt.sites, chosen, one.adapt.dtype), trained | shared, one.frozen._replace(aux=aux)


def _direction(w: np.ndarray, part: Part) -> tuple[Pair, np.ndarray]:
    """(the update of V, ||W||) of one matrix."""
    def length(x: np.ndarray) -> np.ndarray:
        return np.maximum(np.sqrt(np.sum(np.square(x), 0)), SMALLEST)

    c = np.stack([weight / length(w + pair.delta) for weight, pair in zip(part.weights, part.pairs, strict=True)])
    c = c / np.sum(c, 0)
    return join([Pair(pair.a, pair.b * c[t]) for t, pair in enumerate(part.pairs)]), length(w)


def _like(site: Any, rows: list[np.ndarray]) -> jax.Array:
    return jnp.asarray(np.stack(rows).reshape(*site.stack_shape, site.n_out))
