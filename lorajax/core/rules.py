"""Ordered rules (pattern -> variant): which weight gets which adapter. Every rule must take something."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lorajax.core.sites import ATTENTION, Site, Sites
from lorajax.core.variant import Full, Variant, may_drop

Rule = tuple[str, "Variant | Full | None"]

PRESETS: Mapping[str, Callable[[Site], bool]] = {
    "qv": lambda s: bool(s.roles & {"query", "value"}),
    "attention": lambda s: bool(s.roles & ATTENTION),
    "ffn": lambda s: "ffn" in s.roles,
    "all-linear": lambda s: s.op == "matmul" and "head" not in s.roles,
    "conv": lambda s: s.op == "conv",
    "embeddings": lambda s: s.op == "lookup",
}
"""Targets by what the trace shows, whatever the names: a head (whose output reaches no further weight) is in none."""


class RuleError(ValueError):
    """A rule that matches nothing, or asks for what its weight cannot have."""


class Chosen(NamedTuple):
    """What one leaf gets, and by which rule."""

    choice: Variant | Full
    rule: int
    pattern: str


def resolve(sites: Sites, rules: Sequence[Rule]) -> dict[str, Chosen]:
    """path -> Chosen for every leaf that a rule adapts, in tree order.

    A pattern is a preset's name (where no leaf is called so) or a regex that must match the whole path. The first rule
    that matches wins; a variant's rule passes over leaves that are no site (biases, norms), which only `Full()` and
    `None` take.
    Raises RuleError naming the rule, what is there, the nearest, and the way out.
    """
    for i, rule in enumerate(rules):
        if len(rule) != 2 or not isinstance(rule[0], str) or not isinstance(rule[1], (Variant, Full, type(None))):
            raise RuleError(f"rule {i} is {rule!r}; a rule is (pattern, variant), the variant an instance such as "
                            f"LoRA(rank=8), Full() or None")
    taken: dict[str, Chosen] = {}
    hits: list[dict[str, int | None]] = [{} for _ in rules]
    for path in sites.leaves:
        winner: int | None = None
        for i, (pattern, choice) in enumerate(rules):
            if not matches(pattern, path, sites):
                continue
            if isinstance(choice, Variant) and path not in sites:
                hits[i][path] = -1
                continue
            hits[i][path] = winner
            if winner is None:
                winner = i
                if choice is not None:
                    taken[path] = Chosen(_fitted(choice, path, sites), i, pattern)
    for i, (pattern, choice) in enumerate(rules):
        if not any(by is None for by in hits[i].values()):
            raise RuleError(_unused(i, pattern, choice, hits[i], rules, sites))
    if not taken:
        raise RuleError("no rule adapts anything: every rule is None. Give at least one path a variant or Full()")
    return taken


def matches(pattern: str, path: str, sites: Sites) -> bool:
    if pattern in PRESETS and pattern not in sites.leaves:
        return path in sites and PRESETS[pattern](sites[path])
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise RuleError(f"rule pattern {pattern!r} is no regular expression: {error}") from error


def _fitted(choice: Variant | Full, path: str, sites: Sites) -> Variant | Full:
    if isinstance(choice, Full):
        return choice
    site = sites[path]
    try:
        choice = choice.for_lookup() if site.op == "lookup" else choice
        if site.op == "conv":
            choice = choice.for_conv(site.n_in // site.shape[site.in_axes[-1]])
        choice.check(site.n_in, site.n_out)
    except ValueError as error:
        raise RuleError(f"{path} {site.shape}: {error}") from error
    if not choice.factored and may_drop(choice.dropout):
        raise RuleError(f"{path}: {type(choice).__name__} has no low-rank factors, so there is no branch to apply "
                        f"dropout={choice.dropout} to: set dropout=0")
    other = [use.op for use in site.uses if use.op != "matmul"]
    if choice.routed and other:
        raise RuleError(f"{path}: {type(choice).__name__} routes tokens that a matmul reads, and this weight is also "
                        f"or only used by a {other[0]}: leave it out of the rule")
    return choice


def _unused(i: int, pattern: str, choice: Any, hit: Mapping[str, int | None], rules: Sequence[Rule],
            sites: Sites) -> str:
    what = f"rule {i} ({pattern!r} -> {type(choice).__name__ if choice is not None else 'None'})"
    earlier = sorted({by for by in hit.values() if by is not None and by >= 0})
    if earlier:
        first = ", ".join(f"rule {j} ({rules[j][0]!r})" for j in earlier)
        return f"{what} takes nothing: everything it matches was taken by {first}. Move it up, or drop it"
    if hit:
        return (f"{what} matches only {_some(hit)}, which no matmul, convolution or lookup consumes: such a leaf takes "
                f"Full() or None, a low-rank variant needs a weight such as {_some(sites)}")
    if pattern in PRESETS:
        heads = [path for path, site in sites.items() if "head" in site.roles]
        left_out = f" (the heads {_some(heads)} are left out: name one by a regex)" if heads else ""
        return f"{what} matches nothing in this model{left_out}; its weights are {_some(sites)}: print(sites(...))"
    plain = re.sub(r"\\.|[\[\](){}|?*+^$.]+", "", pattern)
    close = difflib.get_close_matches(plain, list(sites.leaves), n=3, cutoff=0.0)
    presets = difflib.get_close_matches(pattern, list(PRESETS), n=1)
    return (f"{what} matches no path. A pattern must match a whole path, for example '.*/kernel'; the nearest paths "
            f"are {_some(close)}" + (f"; did you mean the preset {presets[0]!r}?" if presets else ""))


def _some(paths: Any) -> str:
    paths = list(paths)
    return ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
