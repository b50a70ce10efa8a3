"""Which weights of a model are quantised, and how each is stored: decided by rules on the traced sites.

    plan = quant.plan(sites, [("all-linear", quant.NF4())])
    params = plan.quantize(params)                                   # a tree in memory, or
    loaded = params_from_hf(config, tensors, place=plan.place)       # one weight at a time, as they are read
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.adapt import Adapt
from lorajax.core.layout import leaf, matrix, nameless, over_stack
from lorajax.core.packed import is_packed
from lorajax.core.rules import RuleError, matches
from lorajax.core.sites import Site, Sites, by_path
from lorajax.core.variant import Full, Variant
from lorajax.quant.formats import Format
from lorajax.quant.quantized import Quantized, quantize

Rule = tuple[str, Format | None]


class Storage(NamedTuple):
    """How one weight is stored: the arguments of `quantize`."""

    form: Format
    order: tuple[int, ...]
    run: int
    stack: int


@dataclass(frozen=True)
class Plan:
    """path -> how it is stored, for the weights of `sites` that are quantised."""

    sites: Sites
    rows: Mapping[str, Storage]

    def quantize(self, params: Any) -> Any:
        """`params` with the planned weights quantised; all others are the same arrays. `params` is not changed."""
        return _mapped(params, self._one)

    def place(self, path: str, array: Any) -> Any:
        """One weight as it is loaded, quantised or as an array of the dtype that the sites were traced with."""
        if path not in self.sites.leaves:
            near = ", ".join(list(self.sites.leaves)[:3])
            raise ValueError(f"{path} is no leaf of the model that was traced ({near}, ...): trace the model whose "
                             f"parameters are loaded, with one tree for each layer")
        return self._one(path, jnp.asarray(array, self.sites.leaves[path].dtype))

    def start(self, adapt: Adapt, params: Any) -> tuple[Any, dict[str, Any]]:
        """(`params` quantised, `stats` for ``adapt.init(key, params, stats)``), for the starts that choose the
        quantised weight and the adapter together (`LoftQ`, `QPiSSA`); without such a start it is `quantize`.

        Raises ValueError for such a start on a weight that is not quantised."""
        asked = {path: c for path, c in adapt.plan.items() if isinstance(c, Variant) and c.statistic
                 and c.statistic.of == "quantization"}
        if lost := [path for path in asked if path not in self.rows]:
            raise ValueError(f"{lost[0]} (and {len(lost) - 1} other paths) starts from its quantisation, and no rule "
                             f"quantises it: give it a format, or another initializer")
        stats: dict[str, Any] = {}

        def one(path: str, w: Any) -> Any:
            if path not in asked:
                return self._one(path, w)
            row, site = self.rows[path], self.sites[path]
            new, stats[path] = _prepared(asked[path], nameless(site), row, w)
            made = quantize(new, row.form, row.order, row.run, row.stack)
            return Quantized(made.codes, made.scales, made.format, made.order, made.inner, jnp.dtype(w.dtype))

        return _mapped(params, one), stats

    def without(self, adapt: Adapt) -> Plan:
        """The same plan without the weights that `adapt` trains in full."""
        trained = {path for path, choice in adapt.plan.items() if isinstance(choice, Full)}
        return Plan(self.sites, {path: row for path, row in self.rows.items() if path not in trained})

    def _one(self, path: str, w: Any) -> Any:
        if path not in self.rows:
            return w
        if is_packed(w):
            raise ValueError(f"{path} is quantised already: quantise the original, for a second rounding only loses")
        try:
            return quantize(w, *self.rows[path])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def plan(sites: Sites, rules: Sequence[Rule]) -> Plan:
    """Decides by ordered rules (pattern, format or None), as those of `lorajax.adapt`: presets or regexes on whole
    paths, the first that matches wins.

    Blocks run along a weight's inputs, in torch's order of a linear layer, and along the features of a lookup table.
    Raises RuleError for a rule that takes nothing and for one that names a leaf that no operation consumes; ValueError
    for a weight whose rows are no whole blocks.
    """
    rows: dict[str, Storage] = {}
    seen: set[str] = set()
    for i, (pattern, form) in enumerate(rules):
        if not isinstance(form, Format | None):
            raise RuleError(f"rule {i} is {(pattern, form)!r}; a rule is (pattern, format), the format an instance "
                            f"such as NF4() or None")
        found = [path for path in sites.leaves if path not in seen and matches(pattern, path, sites)]
        weights = [path for path in found if path in sites]
        if not weights:
            what = f"matches only {found[0]!r}, which no matmul, convolution or lookup consumes" if found else \
                "takes nothing"
            raise RuleError(f"rule {i} ({pattern!r} -> {type(form).__name__}) {what}; the weights are "
                            f"{', '.join(map(repr, list(sites)[:3]))}, ...: print(sites)")
        seen |= set(weights)
        for path in weights if form is not None else ():
            rows[path] = _storage(path, sites[path], form)
    return Plan(sites, rows)


def _storage(path: str, site: Site, form: Any) -> Storage:
    out, run = (site.in_axes, site.out_axes) if site.op == "lookup" else (site.out_axes, site.in_axes)
    try:
        form.check(site.extent(run))
    except ValueError as error:
        raise ValueError(f"{path} {site.shape}: {error}") from error
    return Storage(form, (*site.stack_axes, *out, *run), len(run), len(site.stack_axes))


def requantize(dense: Any, like: Any) -> tuple[Any, dict[str, float]]:
    """(`dense` quantised as `like` is, path -> the relative error ||Q - W|| / ||W|| of doing so).

    dense: what `adapt.merge` returned, like: the quantised base. A weight that the merge left as it was keeps its codes
    and scales, so nothing drifts however often this is repeated; always merge from the base and not from its result.
    """
    base, errors = by_path(like)[0], {}

    def one(path: str, w: Any) -> Any:
        old = base[path]
        if not isinstance(old, Quantized):
            return w
        if bool(jnp.all(old.dense() == w)):
            errors[path] = 0.0
            return old
        made = quantize(w, old.format, old.dims, len(old.inner) + 1, old.stacked)
        difference = made.dense().astype(jnp.float32) - w.astype(jnp.float32)
        errors[path] = float(jnp.linalg.norm(difference) / jnp.linalg.norm(w.astype(jnp.float32)))
        return made

    return _mapped(dense, one), errors


def _mapped(params: Any, change: Any) -> Any:
    named, tree = by_path(params)
    return jax.tree.unflatten(tree, [change(path, w) for path, w in named.items()])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prepared(choice: Variant, site: Site, row: Storage, w: jax.Array) -> tuple[jax.Array, Any]:
    """(the leaf to quantise in w's place, float32, the start's state), matrix by matrix."""

    def rounded(m: jax.Array) -> jax.Array:
        stored = m if site.op == "lookup" else m.T
        back = row.form.decode(*row.form.encode(stored)).astype(w.dtype).astype(jnp.float32)
        return back if site.op == "lookup" else back.T

    def one(m: jax.Array) -> Any:
        return choice.before_quantizing(m, rounded)

    new, state = over_stack(site, one)(matrix(site, w).astype(jnp.float32))
    return leaf(site, new), state
