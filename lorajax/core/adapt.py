"""`adapt(sites, rules)`: pure functions that split a model's params into a frozen and a trainable partition."""

from __future__ import annotations

import difflib
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core import compat
from lorajax.core.bound import Bound, Gate, Term, dense, is_bound
from lorajax.core.dropping import dropping, kept
from lorajax.core.layout import aligned, leaf, matrix, nameless, over_stack
from lorajax.core.masks import apply
from lorajax.core.packed import Packed, is_packed, unpacked
from lorajax.core.rules import Chosen, Rule, resolve
from lorajax.core.sites import Site, Sites, by_path
from lorajax.core.summary import summary, trained
from lorajax.core.variant import Full, FullAdapter, Statistic, Variant, may_drop


class Frozen(NamedTuple):
    """What does not train. base: path -> weight as given, an array or quantised (leaves that `Full` trains have moved
    to the trainable partition). aux: path -> adapter whose frozen arrays are filled and whose trained ones are None.
    shared: 'shared:<slot>' -> {leaf: array}, the frozen arrays that all sites of a slot read."""

    base: dict[str, jax.Array]
    aux: dict[str, Any]
    shared: dict[str, dict[str, jax.Array]] = {}  # noqa: RUF012  (a field's default, never written to)


class Slot(NamedTuple):
    """Arrays that several sites share: made by `variant`, sized for the largest in and out of `paths`."""

    variant: Variant
    n_in: int
    n_out: int
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Adapt:
    """The outcome of rules on a model. Holds no array; every method is pure and works under jit and on sharded arrays.

    sites: the model's weights. chosen: path -> (variant, rule). dtype: of the trainable arrays. base: path -> weight
    (or its shapes) of a base that is not as it was traced, see `on`.
    """

    sites: Sites
    chosen: Mapping[str, Chosen]
    dtype: Any = field(default=jnp.float32)
    base: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def plan(self) -> dict[str, Variant | Full]:
        """path -> Variant or Full, in tree order."""
        return {path: c.choice for path, c in self.chosen.items()}

    @functools.cached_property
    def slots(self) -> dict[str, Slot]:
        """'shared:<slot>' -> what its sites share, for the variants that have shared leaves."""
        found: dict[str, Slot] = {}
        for path, choice in self.plan.items():
            if isinstance(choice, Full) or not any(row.shared for row in choice.leaves.values()):
                continue
            key, site = f"shared:{choice.slot}", self.sites[path]
            old = found.get(key, Slot(choice, 1, 1, ()))
            found[key] = Slot(old.variant, max(old.n_in, site.n_in), max(old.n_out, site.n_out), (*old.paths, path))
        return found

    def init(self, key: jax.Array, params: Any,
             stats: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Frozen]:
        """(trainable, frozen) for `params`, a tree like the one that `sites` traced; `params` is not changed.

        trainable: path -> the variant's NamedTuple of arrays, leading dimensions the site's stack; `FullAdapter(w)` for
        `Full`. Arrays that a variant keeps frozen are None there and stand in `frozen.aux`. What sites share is None in
        both and stands once, under 'shared:<slot>', in trainable or in `frozen.shared`.
        stats: path -> what a data-driven initialiser reads (`lorajax.calibrate`). Each site draws from `key`
        folded with its path.
        """
        base = self._checked(params)
        asked = {path: choice.statistic for path, choice in self.plan.items()
                 if isinstance(choice, Variant) and choice.statistic}
        made = [path for path, statistic in asked.items() if statistic.of == "quantization"]
        if blind := [path for path in asked if path not in (stats or {})]:
            what, way = ("its quantisation", "quant.plan(...).start(adapt, params)") if blind[0] in made else (
                "data", "calibrate(adapt, ...)")
            raise ValueError(f"{self.plan[blind[0]]} at {blind[0]!r} (and {len(blind) - 1} other paths) starts from "
                             f"{what}: pass init(key, params, stats) what lorajax.{way} returned")
        if dense := [path for path in made if not (is_packed(base[path]) or isinstance(base[path], jax.core.Tracer))]:
            raise ValueError(f"{dense[0]} (and {len(dense) - 1} other paths) starts from its quantisation, and these "
                             f"params hold it as it was before: pass the params that quant.plan(...).start returned")
        trainable: dict[str, Any] = {}
        aux = {}
        for path, choice in self.plan.items():
            if isinstance(choice, Full):
                trainable[path] = FullAdapter(jnp.array(base[path], self.dtype, copy=True))
                continue
            start = _for(choice, _init_matrices)
            site, seen = self.sites[path], (stats or {}).get(path)
            adapter, _ = start(choice, nameless(site), fold(key, path), base[path], seen)
            adapter = jax.tree.map(lambda x: x.astype(self.dtype) if jnp.isdtype(x.dtype, "real floating") else x,
                                   adapter)  # positions stay integers
            trains = {name: row.trainable for name, row in choice.leaves.items()}
            trainable[path] = adapter._replace(**{name: None for name, on in trains.items() if not on})
            aux[path] = adapter._replace(**{name: None for name, on in trains.items() if on})
        shared = self._shared(key)
        for part in (trainable, aux):
            for name, arrays in shared.items():
                mine = {leaf: x for leaf, x in arrays.items()
                        if self.slots[name].variant.leaves[leaf].trainable == (part is trainable)}
                part |= {name: mine} if mine else {}
        return trainable, self.frozen(params, {path: a for path, a in aux.items() if jax.tree.leaves(a)})

    def _shared(self, key: jax.Array) -> dict[str, dict[str, jax.Array]]:
        """'shared:<slot>' -> the arrays that sites share, trained and frozen."""
        return {name: {leaf: x.astype(self.dtype) for leaf, x in
                       slot.variant.init_shared(fold(key, name), slot.n_in, slot.n_out).items()}
                for name, slot in self.slots.items()}

    def kept(self, frozen: Frozen) -> dict[str, Any]:
        """The frozen arrays that a saved adapter needs: those of the sites, and of the slots that the variant does
        not draw again from its own seed (`Variant.redraws`)."""
        stored = {name: x for name, x in frozen.shared.items() if not self.slots[name].variant.redraws}
        return {**frozen.aux, **stored}

    def frozen(self, params: Any, kept: Mapping[str, Any]) -> Frozen:
        """The frozen partition of `init` from the base and the frozen arrays of its adapters (`kept` or all of them),
        without initialising again: an adapter that was saved with them comes back exactly."""
        base = self._checked(params)
        for path, choice in self.plan.items():
            if isinstance(choice, Full):
                del base[path]
            elif choice.rewrites_weight:
                restore = _for(choice, _restored)
                base[path] = restore(choice, nameless(self.sites[path]), kept.get(path), base[path])
        drawn = {name: {leaf: x for leaf, x in arrays.items() if not self.slots[name].variant.leaves[leaf].trainable}
                 for name, arrays in self._shared(jax.random.key(0)).items()
                 if name not in kept and self.slots[name].variant.redraws}
        shared = {name: kept.get(name, drawn.get(name)) for name in self.slots}
        return Frozen(base, {path: x for path, x in kept.items() if path not in self.slots},
                      {name: x for name, x in shared.items() if x})

    def shared(self, path: str, trainable: Mapping[str, Any], frozen: Frozen) -> dict[str, jax.Array]:
        """leaf -> the array of its slot as the site at `path` reads it, without a stack; {} where nothing is shared."""
        site, choice = self.sites[path], self.plan[path]
        name = "" if isinstance(choice, Full) else f"shared:{choice.slot}"
        if isinstance(choice, Full) or name not in self.slots:
            return {}
        arrays = {**trainable.get(name, {}), **frozen.shared.get(name, {})}
        return choice.read_shared(arrays, site.n_in, site.n_out)

    def bind(self, trainable: Mapping[str, Any], frozen: Frozen, *, key: jax.Array | None = None,
             masks: Mapping[str, Any] | None = None, onto: Any = None) -> Any:
        """The params tree with a `Bound` node for each adapted weight: what `lift(fn)` takes for `params`.

        key: PRNG key that turns the adapters' dropout on (training). masks: path -> multipliers, (stack..., rank) for
        every trainable array along its rank dimension or one for each array; see `masks`. onto: a tree that another
        Adapt of the same model has bound; its adapters and these add up. ValueError for one that rewrites its weight.
        """
        for path in masks or ():
            if path not in self.plan:
                near = difflib.get_close_matches(path, list(self.plan), n=1, cutoff=0.0)
                raise ValueError(f"a mask for {path!r}, which no rule adapts; the nearest adapted path is {near[0]!r}")
        leaves: dict[str, Any] = dict(frozen.base) if onto is None else by_path(onto, is_leaf=is_bound)[0]
        for path, choice in self.plan.items():
            adapter = trainable[path]
            if path in frozen.aux:
                halves = zip(adapter, frozen.aux[path], strict=True)
                adapter = type(adapter)(*[train if fixed is None else fixed for train, fixed in halves])
            if masks and path in masks:
                adapter = apply(masks[path], choice.leaves, adapter)
            weight: Any = leaves.get(path)
            if isinstance(choice, Full):
                w = adapter.w.astype(self.sites.leaves[path].dtype)
                leaves[path] = Bound(w, weight.terms, path) if is_bound(weight) else w
                continue
            if onto is not None and choice.rewrites_weight:
                raise ValueError(f"{path}: {type(choice).__name__} starts from another weight than the base, and the "
                                 f"tree it is bound onto has its own: bind this one first and the others onto it, or "
                                 f"set fold=False")
            site = self.sites[path]
            w, terms = (weight.w, weight.terms) if is_bound(weight) else (weight, ())
            shared = self.shared(path, trainable, frozen)
            if choice.factored:
                term = self._term(site, choice, adapter, w, shared, key)
                leaves[path] = Bound(w, (*terms, term), path)
            else:
                update = _delta(choice, site, adapter, w, shared)
                if key is not None and may_drop(choice.module_dropout):
                    on = kept(choice.module_dropout, jax.random.fold_in(fold(key, path), 2), site.stack_shape)
                    update = update * on[..., None, None]
                w = (unpacked(w).astype(jnp.float32) + leaf(site, update)).astype(w.dtype)
                leaves[path] = Bound(w, terms, path) if terms else w
        return jax.tree.unflatten(self.sites.tree, [leaves[path] for path in self.sites.leaves])

    def _term(self, site: Site, choice: Variant, adapter: Any, w: jax.Array, shared: dict[str, jax.Array],
              key: jax.Array | None) -> Term:
        if choice.reads_weight:
            read = _for(choice, _shared_term)
            run = lambda adapter, w, shared: read(choice, nameless(site), adapter, w, shared)  # noqa: E731
            if is_packed(w):  # unpacked again in the backward pass, if that reads it at all
                run = _kept_packed(run)
            term = run(adapter, w, shared)
        else:
            term = _term(choice, site, adapter, None, shared)
        return term if key is None else dropping(term, site, choice, fold(key, site.path))

    def merge(self, trainable: Mapping[str, Any], frozen: Frozen, *,
              masks: Mapping[str, Any] | None = None) -> Any:
        """Plain params, each adapted weight W' in the base's dtype (summed in float32), quantised ones as dense arrays
        (`lorajax.quant.requantize` quantises them again). The partitions stay as they are: to unmerge, go on using
        `frozen.base`, which is the base bit for bit.

        Raises ValueError for a variant with a router, which no one weight stands for."""
        bound = self.bind(trainable, frozen, masks=masks)
        return jax.tree.map(lambda x: dense(x) if is_bound(x) else unpacked(x), bound,
                            is_leaf=lambda x: is_bound(x) or is_packed(x))

    @property
    def labels(self) -> dict[str, Any]:
        """Like `trainable`, with the leaf table's label (`a`, `b`, `e`, `full`, ...) for each array: what
        `optax.multi_transform` reads."""
        trainable = self.shapes[0]
        own = {path: type(trainable[path])(*[x if x is None else choice.leaves[name].label
                                             for name, x in trainable[path]._asdict().items()])
               for path, choice in self.plan.items()}
        return own | {name: {leaf: slot.variant.leaves[leaf].label for leaf in trainable[name]}
                      for name, slot in self.slots.items() if name in trainable}

    @functools.cached_property
    def shapes(self) -> tuple[dict[str, Any], Frozen]:
        """`init`'s result as `jax.ShapeDtypeStruct`s."""
        params = jax.tree.unflatten(self.sites.tree, list((self.base or self.sites.leaves).values()))
        read = {path: (self.sites[path], c.statistic) for path, c in self.plan.items()
                if isinstance(c, Variant) and c.statistic}
        stats = {path: blank(site, statistic) for path, (site, statistic) in read.items()}
        trainable, frozen = jax.eval_shape(self.init, jax.random.key(0), params, stats)
        return {path: trainable[path] for path in (*self.plan, *self.slots) if path in trainable}, frozen

    def on(self, params: Any) -> Adapt:
        """The same plan, its `shapes` and printed memory those on `params`, arrays or shapes: on a quantised base."""
        found = jax.eval_shape(lambda leaves: leaves, self._checked(params))
        return replace(self, base={path: found[path] for path in self.sites.leaves})

    def penalty(self, trainable: Mapping[str, Any]) -> jax.Array:
        """The variants' own loss terms, summed over matrices; 0 if they have none. Float32 scalar."""
        total = jnp.zeros((), jnp.float32)
        having = {p: c for p, c in self.plan.items()
                  if isinstance(c, Variant) and type(c.inner).penalty is not Variant.penalty}
        for path, choice in having.items():
            alike = [self.sites[p] for p, c in having.items() if type(c.inner) is type(choice.inner)]
            one = functools.partial(choice.penalty, share=1.0 / sum(site.extent(site.stack_axes) for site in alike))
            total = total + jnp.sum(over_stack(self.sites[path], one)(trainable[path]))
        return total

    def count(self, trainable: Mapping[str, Any] | None = None) -> int:
        """Number of trained parameters; leaves that stay at their start (`Variant.still`) are not among them."""
        return sum(trained(self, self.shapes[0] if trainable is None else trainable).values())

    def _checked(self, params: Any) -> dict[str, jax.Array]:
        """path -> leaf, after comparing paths and shapes with the traced ones."""
        leaves, _ = by_path(params)
        missing, extra = self.sites.leaves.keys() - leaves.keys(), leaves.keys() - self.sites.leaves.keys()
        if missing or extra:
            raise ValueError(f"params differ from those that sites() traced: missing {sorted(missing)[:3]}, "
                             f"unexpected {sorted(extra)[:3]}. Call sites() on this model's params")
        for path, want in self.sites.leaves.items():
            if leaves[path].shape != want.shape:
                raise ValueError(f"{path} has shape {leaves[path].shape}, but sites() traced {want.shape}")
        for path, choice in self.plan.items():
            if is_packed(leaves[path]) and isinstance(choice, Full):
                raise ValueError(f"{path} is quantised, so Full() cannot train it: leave it out of the quantisation, "
                                 f"or give it a variant")
            if is_packed(leaves[path]) and isinstance(choice, Variant) and choice.rewrites_weight:
                raise ValueError(f"{path} is quantised, and {type(choice).__name__} with fold=True rewrites it: "
                                 f"set fold=False, or start from initializer='qpissa' or 'loftq'")
        return {path: leaves[path] for path in self.sites.leaves}

    def __str__(self) -> str:
        return summary(self)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init_matrices(variant: Variant, site: Site, key: jax.Array, w: jax.Array, stats: Any) -> Any:
    keys = jax.random.split(key, site.stack_shape) if site.stack_axes else key
    m = matrix(site, w).astype(jnp.float32)
    if stats is None:
        return over_stack(site, lambda k, m: variant.init(k, m))(keys, m)
    return over_stack(site, variant.init)(keys, m, stats)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _restored(variant: Variant, site: Site, adapter: Any, w: jax.Array) -> jax.Array:
    new = over_stack(site, variant.restore)(adapter, matrix(site, w).astype(jnp.float32))
    return leaf(site, new).astype(w.dtype)


def blank(site: Site, statistic: Statistic) -> Any:
    """The shapes of a statistic of every matrix of the site."""
    one = jax.eval_shape(lambda: statistic.init(site.n_in, site.n_out))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*site.stack_shape, *x.shape), x.dtype), one)


def _term(variant: Variant, site: Site, adapter: Any, w: jax.Array | None, shared: dict[str, jax.Array]) -> Term:
    """The variant's factors for every matrix of the site, aligned. What does not differ between them does not get a
    stack dimension: a scale that is a Python number, a factor that is a shared array itself."""
    same: dict[str, Any] = {}

    def one(adapter: Any, w: Any) -> Any:
        found = variant.factors(adapter._replace(**shared), w)
        same.update({name: x for name, x in found._asdict().items()
                     if isinstance(x, (int, float)) or any(x is y for y in shared.values())})
        return found._replace(**dict.fromkeys(same))

    rows = w.rows() if is_packed(w) and site.stack_axes[:1] == (0,) else None  # type: ignore[union-attr]
    of_each = (adapter, None if w is None or rows is not None else _read(variant, matrix(site, w)))
    if rows is not None:
        factors = jax.lax.map(_kept_packed(lambda xs: _of_layer(variant, site, one, *xs)), (adapter, rows))
    else:
        factors = over_stack(site, one)(*of_each) if jax.tree.leaves(of_each) else one(*of_each)  # all may be shared
    term = aligned(site, factors._replace(**same))
    return term._replace(gate=Gate(variant.gate)) if variant.routed else term


_kept_packed = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
"""Of a function that unpacks weights: the backward pass does it again."""


def _of_layer(variant: Variant, site: Site, function: Callable[..., Any], adapter: Any, w: Packed) -> Any:
    """`function` of the matrices in one layer of a packed stack, so that no more than these are unpacked at a time."""
    first = replace(site, shape=(1, *site.shape[1:]))
    adapter, m = jax.tree.map(lambda x: x[None], (adapter, w.dense()))
    return jax.tree.map(lambda x: x[0], over_stack(first, function)(adapter, _read(variant, matrix(first, m))))


def _read(variant: Variant, m: jax.Array) -> jax.Array:
    return m if variant.reads_stored else m.astype(jnp.float32)


_shared_term = jax.jit(_term, static_argnums=(0, 1))
"""For a variant that reads its weight: equal layers share one traced and differentiated function."""


def _delta(variant: Variant, site: Site, adapter: Any, w: jax.Array, shared: dict[str, jax.Array]) -> jax.Array:
    """(stack..., in, out): the update of a variant that has no factors."""
    def run(adapter: Any, shared: Any, m: jax.Array) -> jax.Array:
        return over_stack(site, lambda adapter, m: variant.delta(adapter._replace(**shared), m))(adapter, m)

    m = matrix(site, w).astype(jnp.float32)
    return compat.automatic(run, compat.place(m), adapter, shared, m)


def _for(variant: Variant, jitted: Any) -> Any:
    """The plain function where the variant holds a traced number (many runs in one program): no cache can key that."""
    try:
        hash(variant)
    except TypeError:
        return jitted.__wrapped__
    return jitted


def fold(key: jax.Array, path: str) -> jax.Array:
    """A key of its own for each path."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def adapt(sites: Sites, rules: Sequence[Rule], dtype: Any = jnp.float32) -> Adapt:
    """Decides by ordered rules what each weight gets. `rules`: (pattern, choice) pairs; see `resolve` for matching.

    Raises RuleError for a rule that takes nothing or a variant that does not fit its weight.
    """
    return Adapt(sites, resolve(sites, list(rules)), dtype)
