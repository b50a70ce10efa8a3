"""A budget and scores per site -> a rank per site -> rules for `adapt`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorajax.core.variant import Full, Variant


def allocate(adapt: Any, scores: Mapping[str, float], *, ranks: int | None = None, parameters: int | None = None,
             minimum: int = 1) -> dict[str, int]:
    """site path -> rank, proportional to its score, within minimum..min(in, out), and as much as the budget allows.

    scores: path -> importance >= 0 (`lorajax.control.importance`) of the sites that share the budget.
    ranks: the budget in ranks, one for each rank of each matrix (a stacked site of n layers spends n at a time).
    parameters: the budget in numbers of A and B, ``in + out`` for each rank of each matrix. Give one of the two.
    minimum: of every site; 0 lets sites go without.

    Rounding is by largest remainder: shares are rounded down, and what is left goes to the sites that lost most, while
    it fits. So the budget is met exactly in ranks where no site is stacked, and otherwise missed by less than a rank.
    ValueError for a budget that cannot pay `minimum` for every site, and for scores that are all 0, or negative.
    """
    if (ranks is None) == (parameters is None):
        raise ValueError(f"ranks={ranks} and parameters={parameters}: give the budget as one of the two")
    if missing := sorted(set(scores) - {p for p, c in adapt.plan.items() if isinstance(c, Variant)}):
        raise ValueError(f"scores name {missing}, which have no adapter; these have: "
                         f"{', '.join(p for p, c in adapt.plan.items() if isinstance(c, Variant)) or 'none'}")
    for path, score in scores.items():
        if not (score >= 0 and math.isfinite(score)):
            raise ValueError(f"{path}: score {score} is not a finite number >= 0")
    if not any(scores.values()):
        raise ValueError("all scores are 0: sensitivities are, while B is 0. Use the gradient norm, or train first")
    sites = {path: adapt.sites[path] for path in scores}
    matrices = {path: site.extent(site.stack_axes) for path, site in sites.items()}
    cost = {p: matrices[p] * (1 if parameters is None else s.n_in + s.n_out) for p, s in sites.items()}
    most = {path: min(site.n_in, site.n_out) for path, site in sites.items()}
    budget, unit = (ranks or 0, "ranks") if parameters is None else (parameters, "parameters")
    least = {path: minimum * cost[path] for path in scores}
    if sum(least.values()) > budget:
        dearest = max(least, key=lambda path: least[path])
        raise ValueError(f"a budget of {budget} {unit} is below {sum(least.values())}, what rank {minimum} at each of "
                         f"{len(scores)} sites takes ({dearest}: {least[dearest]}): raise the budget, adapt fewer "
                         f"sites, or allow minimum=0")
    share = _shares(scores, cost, budget, minimum, most)
    found = {path: math.floor(share[path] + 1e-9) for path in scores}
    left = budget - sum(cost[path] * found[path] for path in scores)
    while True:
        fits = [p for p in scores if cost[p] <= left and found[p] < most[p] and scores[p] > 0]
        if not fits:
            return found
        path = max(fits, key=lambda p: share[p] - found[p])  # the first of equals, in the order of `scores`
        found[path] += 1
        left -= cost[path]


def _shares(scores: Mapping[str, float], cost: Mapping[str, int], budget: int, minimum: int,
            most: Mapping[str, int]) -> dict[str, float]:
    """``clip(t * score, minimum, most)`` with the t at which the costs add up to `budget`, by bisection."""
    low, high = 0.0, max(most.values()) / min(score for score in scores.values() if score > 0)

    def at(t: float) -> dict[str, float]:
        return {path: min(max(t * score, minimum), most[path]) for path, score in scores.items()}

    for _ in range(200):
        middle = (low + high) / 2
        spent = sum(cost[path] * r for path, r in at(middle).items())
        low, high = (middle, high) if spent <= budget else (low, middle)
    return at(low)


def with_ranks(adapt: Any, ranks: Mapping[str, int], *, keep: str = "alpha") -> list[tuple[str, Any]]:
    """Rules for `adapt` that repeat `adapt`'s own plan path by path, with these ranks; rank 0 leaves a site alone.

    keep: what stays while r changes: ``alpha`` (so s = alpha / r differs per site, as with PEFT's rank_pattern) or
    ``scale`` (s stays, alpha changes).
    """
    if keep not in ("alpha", "scale"):
        raise ValueError(f"keep={keep!r} is unknown; there are 'alpha' and 'scale'")
    rules: list[tuple[str, Any]] = []
    for path, choice in adapt.plan.items():
        if path not in ranks or isinstance(choice, Full):
            rules.append((re.escape(path), choice))
        elif ranks[path] == 0:
            rules.append((re.escape(path), None))
        else:
            rules.append((re.escape(path), _at_rank(choice, ranks[path], keep)))
    return rules


def _at_rank(choice: Any, rank: int, keep: str) -> Any:
    if choice.inner is not choice:  # a wrapper (DoRA) has the rank of what it wraps
        return replace(choice, of=_at_rank(choice.inner, rank, keep))
    new = replace(choice, rank=rank)
    return replace(new, alpha=choice.alpha * choice.scale / new.scale) if keep == "scale" else new
