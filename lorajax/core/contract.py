"""Where a bound weight meets data: x W' = x W + (x A) B, never W + AB, forward or backward.

Rules for `dot_general`, `conv_general_dilated`, `gather` (embedding lookup) and `ragged_dot` (experts). The base
product is the original equation on the frozen weight; then the data with the factor that spans the contracted
dimensions, then with the other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lorajax.core import compat
from lorajax.core.bound import RANK, Bound, Factor, Term, dense, wide
from lorajax.core.gated import WIDEST, Waiting
from lorajax.core.labelled import FREE, Labelled, meet, times
from lorajax.core.packed import is_packed, moved, product
from lorajax.core.routed import gated, weighed
from lorajax.core.structure import Decline
from lorajax.core.tap import tapped

PRODUCT = "product"
"""The name of x W' for `jax.checkpoint`: a policy that keeps it (`save_only_these_names`) keeps one array, where one
that keeps dots keeps x W and (x A) B."""


def dropped(term: Term, x: Labelled) -> Labelled:
    """Inverted dropout of the term's input, one mask per entry of a stacked key."""
    if term.key is None or term.rate is None:
        return x
    batch = [d for d in term.key.dims if d in x.labels]
    if len(batch) != len(term.key.dims):
        raise ValueError(f"dropout on a stacked weight whose layers all read one input (weight dimensions "
                         f"{[d for d in term.key.dims if d not in batch]}): set dropout=0 for this path")
    order = [x.labels.index(d) for d in batch] + [i for i, d in enumerate(x.labels) if d not in batch]
    array = lax.transpose(x.array, order)

    def mask(key, rate, array):
        keep = 1.0 - jnp.asarray(rate, array.dtype)
        return jnp.where(jax.random.bernoulli(key, 1.0 - rate, array.shape), array / keep, jnp.zeros((), array.dtype))

    keys = Factor(term.key.array, term.key.dims).spread(tuple(batch))
    rates = jnp.broadcast_to(term.rate.spread(tuple(batch)), keys.shape)
    for _ in batch:
        mask = jax.vmap(mask)
    return Labelled(mask(keys, rates, array), tuple(x.labels[i] for i in order))


def scale(y: jax.Array, g: jax.Array) -> jax.Array:
    """y times a broadcastable scale, in float32 or better, back in y's dtype."""
    compute = wide(y.dtype)
    return (y.astype(compute) * g.astype(compute)).astype(y.dtype)


def dot_general(eqn, left, right, hidden: Any = None, wait: bool = False) -> jax.Array | Waiting:
    """x W' for any dimension numbers, the weight on either side. hidden: of `lorajax.core.siblings.Ahead`. wait: what
    reads the result can add the update itself (`lorajax.core.gated`)."""
    if isinstance(left, Bound) and isinstance(right, Bound):
        raise Decline("a product of two weights")
    node_left = isinstance(left, Bound)
    node, x = (left, right) if node_left else (right, left)
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    (nc, nb), (xc, xb) = ((lc, lb), (rc, rb)) if node_left else ((rc, rb), (lc, lb))
    names = dict(zip((*xc, *xb), (*nc, *nb), strict=True))
    x = Labelled(x, tuple(names.get(i, FREE + i) for i in range(jnp.ndim(x))))
    free_n = [d for d in range(node.ndim) if d not in nc and d not in nb]
    free_x = [d for d in x.labels if d >= FREE]
    out = (*nb, *free_n, *free_x) if node_left else (*nb, *free_x, *free_n)

    def run(w: jax.Array, x: jax.Array) -> jax.Array:
        return compat.bind(eqn, [w, x] if node_left else [x, w])[0]

    def base(x: Labelled) -> jax.Array:
        order = [x.labels.index(names.get(i, FREE + i)) for i in range(len(x.labels))]
        array = x.array if order == sorted(order) else lax.transpose(x.array, order)
        return product(run, node.w, array)

    sizes = [x.array.shape[x.labels.index(d)] if d in x.labels else node.shape[d] for d in out]
    mesh = compat.explicit_mesh(x.array, *([] if is_packed(node.w) else [node.w]))
    last, redo = _last(node, set(nc)), list[Term]()
    if last is not None:
        y = base(x)
    else:
        x_in, scales, redo = _split_scales(node, x, set(nc), out, sizes)
        y = base(x_in)
        if scales is not None:
            y = scale(y, scales)
    how = {"precision": eqn.params["precision"], "preferred_element_type": eqn.params["preferred_element_type"]}
    for i, term in enumerate(node.terms):
        if term.tap is not None:
            y = tapped(y, x, term.tap, term.seen, set(nc), node.path)
        xt = dropped(term, x) if (term.a is not None or term in redo) else x
        if term in redo:  # with dropout, (g - 1) acts on the dropped input: a second base product
            y = y + scale(base(xt), for_tokens(term, term.g.spread(out) - 1, 0, out, sizes, node.path))
        if term.a is not None and term.b is not None:
            given = None if hidden is None or hidden[i] is None else Labelled(hidden[i], (*free_x, RANK))
            b = term.b if last is None else term.bare
            if wait and mesh is None and not compat.manual() and term is node.terms[-1] and term.only is None:
                parts = components(term, term.a, b, xt, x, out, set(nc), node_left, mesh, how, given)
                if (later := _waiting(*parts[:3], y, out, last)) is not None:
                    return later
            update = low_rank(term, term.a, b, xt, x, out, set(nc), node_left, mesh, y, how, given)
            y = y + for_tokens(term, update.astype(y.dtype), 0, out, sizes, node.path)
    y = checkpoint_name(y, PRODUCT)
    return y if last is None else scale(y, last.spread(out))


def _waiting(hidden: Labelled, second: Labelled, o: Factor | None, y: jax.Array, out: tuple[int, ...],
             g: Factor | None) -> Waiting | None:
    """(y + hidden second) g for who reads it to add up; None where that is no product of two matrices."""
    *rows, column = out
    if o is not None or hidden.labels != (*rows, RANK) or {*second.labels} != {RANK, column} or (
            g is not None and g.dims != (column,)) or second.array.size > WIDEST * y.shape[-1]:
        return None
    b = Factor(*second).spread((RANK, column))
    return Waiting(checkpoint_name(y, PRODUCT), hidden.array.astype(y.dtype), b.astype(y.dtype),
                   None if g is None else g.array)


def added(x: Waiting) -> jax.Array:
    """What a product that waits stands for."""
    update = lax.dot_general(x.h.reshape(-1, x.h.shape[-1]), x.b, (((1,), (0,)), ((), ())))
    y = x.y + update.reshape(x.y.shape)
    return y if x.g is None else scale(y, x.g.reshape(*[1] * (y.ndim - 1), -1))


def _last(node: Bound, contracted: set[int]) -> Factor | None:
    """The scale that multiplies the sum of both products, (x W + (x a) bare) g: a pass that whatever reads the result
    does as it reads, where a scale of x W alone writes that once more."""
    (term, *others), g = node.terms or (Term(),), None
    if term.bare is not None and not others and term.key is None and term.only is None:
        g = term.g
    return None if g is None or contracted.intersection(g.dims) else g


def for_tokens(term: Term, y: jax.Array, other: float, labels: tuple[int, ...], sizes: Sequence[int],
               path: str) -> jax.Array:
    """y, whose dimensions are `labels`, for the tokens that the term acts on, and `other` for the rest of the row."""
    if term.only is None:
        return y
    wide = [i for i, (d, n) in enumerate(zip(labels, sizes, strict=True)) if d >= FREE and n != 1]
    if [sizes[i] for i in wide] != [n for n in term.only.shape if n != 1]:
        raise ValueError(f"{path}: spans name an adapter for each of {term.only.size} tokens, and this weight reads "
                         f"rows of {[sizes[i] for i in wide]}: leave it out, or give each row one adapter")
    on = term.only.reshape([-1 if i in wide else 1 for i in range(len(labels))])
    return jnp.where(on, y, jnp.asarray(other, y.dtype))


def _split_scales(node: Bound, x: Labelled, contracted: set[int], out: tuple[int, ...], sizes: Sequence[int] = ()):
    """(x with in-scales applied, product of out-scales shaped like the result or None, terms that need a second base
    product because their scale acts on dropped input)."""
    scaling = [(t, t.g) for t in node.terms if t.g is not None]
    redo = [t for t, _ in scaling if t.key is not None]
    once = [g for t, g in scaling if t.key is None]
    inner = [g for g in once if contracted.issuperset(g.dims)]
    outer = [g for g in once if not contracted.intersection(g.dims)]
    if inner and any(t.only is not None for t, _ in scaling):
        raise ValueError(f"{node.path}: a scale of inputs for some tokens of a row: give rows one adapter each")
    if len(inner) + len(outer) != len(once) or (inner and len(scaling) > 1):
        raise Decline("scales along both sides of one product")
    if any(contracted.intersection(g.dims) for t, g in scaling if t.key is not None):
        raise Decline("a dropped scale along the contracted side")
    if inner:
        x = Labelled(scale(x.array, inner[0].spread(x.labels)), x.labels)
    spread = [for_tokens(t, g.spread(out), 1, out, sizes, node.path) for t, g in scaling if g in outer]
    total = spread[0] if len(spread) == 1 else sum((g - 1 for g in spread), 1.0) if spread else None
    return x, total, redo


def low_rank(term: Term, a: Factor, b: Factor, x: Labelled, undropped: Labelled, out: tuple[int, ...],
             contracted: set[int], node_left: bool, mesh: Any, y: jax.Array, how: dict[str, Any],
             given: Labelled | None = None) -> jax.Array:
    """s ((x a) e) b o in the dimensions `out`, whichever factor spans the contracted dimensions first. given: x a."""
    hidden, second, o, spec = components(term, a, b, x, undropped, out, contracted, node_left, mesh, how, given)
    if mesh is not None:
        spec = dict(zip(out, compat.place(y), strict=True))
    pair = (second, hidden) if node_left else (hidden, second)
    update = meet(*pair, set(out), mesh, spec, **how)
    update = update if o is None else times(update, o)
    array = Factor(*update).spread(out) if update.labels != tuple(out) else update.array
    return array if array.shape == y.shape else jnp.broadcast_to(array, y.shape)


def components(term: Term, a: Factor, b: Factor, x: Labelled, undropped: Labelled, out: tuple[int, ...],
               contracted: set[int], node_left: bool, mesh: Any, how: dict[str, Any],
               given: Labelled | None = None) -> tuple[Labelled, Labelled, Factor | None, Any]:
    """The rank components s (x a) e of the update, the factor that they meet next, the scale after that, and where the
    dimensions of all lie."""
    factors = sorted((a, b), key=lambda f: -_spanned(f, contracted))
    first, second = (Labelled(f.astype(x.array.dtype).array, f.dims) for f in factors)
    spec = _specs(mesh, x, first, second, *[Labelled(f.array, f.dims) for f in (term.e, term.o) if f is not None])
    o = term.o
    if o is not None and contracted.intersection(o.dims):  # the weight is used transposed: its outputs are the input
        x, o = times(x, o), None
    keep = {*out, *second.labels, *(term.e.dims if term.e is not None else ())}
    pair = (first, x) if node_left else (x, first)
    hidden = given or meet(*pair, keep, mesh, spec, precision=how["precision"])
    hidden = hidden._replace(array=term.scaled(hidden.array))
    if term.e is not None:
        hidden = times(hidden, term.e)
    if term.given is not None and term.gate is not None:
        hidden = weighed(term.given, term.gate.function, hidden)
    elif term.router is not None and term.gate is not None:
        hidden = gated(term, term.router, term.gate.function, hidden, undropped, contracted, {*out, RANK}, mesh, spec,
                       how)
    return hidden, second, o, spec


def _spanned(f: Factor, dims: set[int]) -> int:
    total = 1
    for d in dims.intersection(f.dims):
        total *= f.size(d)
    return total if dims.intersection(f.dims) else 0


def _specs(mesh, *arrays: Labelled) -> dict[int, Any]:
    """label -> mesh axis, from the operands' types; the contracted ones are dropped by their absence from a result."""
    spec: dict[int, Any] = {}
    if mesh is not None:
        for t in arrays:
            for label, entry in zip(t.labels, compat.place(t.array), strict=True):
                if label != RANK and spec.get(label) is None:
                    spec[label] = entry
    return spec


def unrouted(term: Term) -> Term:
    """The term as factors alone, for a product with no activations of the router's kind or none of tokens."""
    if term.only is not None:
        raise Decline("its adapters act on some tokens of a row, which this product does not tell apart")
    if term.gate is not None:
        raise Decline("its adapter has a router, which reads the tokens of a matmul")
    return term.folded()


def conv(eqn, x, node) -> jax.Array:
    """Convolution by a bound kernel: x with the kernel `a` of r output channels, then a 1x1 product with `b`."""
    if isinstance(x, Bound):
        raise Decline("a weight as the image of a convolution")
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] != 1:
        raise Decline("batch_group_count")
    out_dim, in_dim, *window = numbers.rhs_spec
    channel = numbers.out_spec[1]
    reads = {in_dim, *window}
    if any(t.g is not None and reads.intersection(t.g.dims) for t in node.terms):
        raise Decline("a scale along the window of a convolution")

    def base(x: jax.Array) -> jax.Array:
        return product(lambda w, x: compat.bind(eqn, [x, w])[0], node.w, x)

    y = base(x)
    result: tuple[int, ...] = tuple(out_dim if i == channel else FREE + i for i in range(jnp.ndim(x)))
    x, scales, redo = _split_scales(node, Labelled(x, tuple(FREE + i for i in range(jnp.ndim(x)))), reads, result)
    if scales is not None:
        y = scale(y, scales)
    how = {"precision": eqn.params["precision"]}
    for term in node.terms:
        xt = dropped(term, x) if (term.a is not None or term in redo) else x
        if term in redo:  # as in dot_general
            y = y + scale(base(xt.array), term.g.spread(result) - 1)
        term = unrouted(term)
        if term.a is None or term.b is None:
            continue
        a, b = (term.a, term.b) if reads.intersection(term.a.dims) else (term.b, term.a)
        if out_dim in a.dims or reads.intersection(b.dims):
            raise Decline("factors of a convolution that do not split into window and output channels")
        a, b, rank = a.astype(x.array.dtype), b.astype(x.array.dtype), a.size(RANK)
        dims = tuple(RANK if d == out_dim else d for d in range(node.ndim))
        kernel = a.spread(dims)
        full = [node.shape[d] if d in reads else rank for d in range(node.ndim)]
        kernel = jnp.broadcast_to(kernel, full)
        if groups > 1:
            kernel = jnp.concatenate([kernel] * groups, axis=out_dim)
        params = dict(eqn.params, preferred_element_type=None)
        hidden = term.scaled(eqn.primitive.bind(xt.array, kernel, **params))
        hidden = hidden.reshape(*hidden.shape[:channel], groups, rank, *hidden.shape[channel + 1:])
        b_array = Factor(b.array, b.dims).spread((out_dim, RANK)).reshape(groups, -1, rank)
        d = lax.dot_general(hidden, b_array, (((channel + 1,), (2,)), ((channel,), (0,))), **how)
        # (groups, batch and space, out / groups) -> groups and channels side by side, where the channel dimension is
        d = jnp.moveaxis(d, (0, -1), (channel, channel + 1))
        y = y + d.reshape(y.shape).astype(y.dtype)
    return y


def gather(eqn, node, indices) -> jax.Array | Bound:
    """Rows of a bound table. If one factor then runs along the indices alone and the other along the row alone it is
    a lookup, a product of the two; otherwise (a layer picked out of a stack) the result is a bound weight again.
    There is no input to drop in a lookup: an adapter's dropout does not act here (as in loralib and PEFT)."""
    if not isinstance(node, Bound):
        raise Decline("a weight as the index of a gather")
    p, n = eqn.params["dimension_numbers"], node.ndim
    indexed = set(p.start_index_map)
    sizes = eqn.params["slice_sizes"]
    rest = [d for d in range(n) if d not in p.collapsed_slice_dims and d not in p.operand_batching_dims]
    if p.operand_batching_dims or not indexed.issubset(p.collapsed_slice_dims) or any(
            sizes[d] != node.shape[d] for d in rest):
        raise Decline("a gather of windows or with batched tables")
    w = moved(eqn, node.w, indices)[0]
    batch = tuple(i for i in range(w.ndim) if i not in p.offset_dims)
    names = dict(zip(rest, p.offset_dims, strict=True))

    def rows(f: Factor, fill: float) -> Factor:
        mine = indexed.intersection(f.dims)
        if mine and mine != indexed:
            raise Decline("a gather along dimensions of which a factor spans some")
        if not mine:
            return Factor(f.array, tuple(d if d == RANK else names[d] for d in f.dims))
        keep = [d for d in f.dims if d not in indexed]
        at = tuple(f.dims.index(d) for d in p.start_index_map)
        numbers = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(batch), len(batch) + len(keep))), collapsed_slice_dims=tuple(sorted(at)),
            start_index_map=at)
        window = tuple(1 if d in indexed else s for d, s in zip(f.dims, f.array.shape, strict=True))
        array = lax.gather(f.array, indices, numbers, window, unique_indices=eqn.params["unique_indices"],
                           indices_are_sorted=eqn.params["indices_are_sorted"], mode=eqn.params["mode"],
                           fill_value=fill)
        return Factor(array, (*batch, *[d if d == RANK else names[d] for d in keep]))

    terms = []
    for term in node.terms:
        t = unrouted(term._replace(only=None))
        a, b, g = (f and rows(f, fill) for f, fill in ((t.a, 0), (t.b, 0), (t.g, 1)))
        if term.only is not None:
            labels, sizes = tuple(FREE + i for i in batch), [w.shape[i] for i in batch]
            on = Factor(for_tokens(term, jnp.ones(sizes), 0, labels, sizes, node.path), batch)
            change = g and Factor(g.array - 1, g.dims).times(on)
            b, g = b and b.times(on), change and Factor(change.array + 1, change.dims)
        terms.append(Term(a, b, g, s=t.s))
    out = Bound(w, tuple(terms), node.path)
    inside = set(p.offset_dims)
    if all(t.a is None or t.b is None or not (inside.intersection(t.a.dims) and inside.intersection(t.b.dims))
           for t in terms):
        return dense(out)
    if any(t.key is not None for t in node.terms):
        raise ValueError(f"{node.path}: dropout on a weight that is picked from a stack by an array of indices")
    return out


def ragged_dot(eqn, x, node, *sizes) -> jax.Array:
    """Rows sorted by group times one weight per group (experts)."""
    if isinstance(x, Bound):
        raise Decline("a weight as the rows of ragged_dot")
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ((xc, nc), (xb, nb)) = numbers.dot_dimension_numbers
    if xb or nb or len(xc) != 1 or len(numbers.rhs_group_dimensions) != 1 or numbers.lhs_ragged_dimensions == xc:
        raise Decline("ragged_dot with batch dimensions or a ragged contraction")
    group, contracted = numbers.rhs_group_dimensions[0], nc[0]
    out = next(d for d in range(node.ndim) if d not in (group, contracted))
    y = product(lambda w, x, *sizes: compat.bind(eqn, [x, w, *sizes])[0], node.w, x, *sizes)
    for term in map(unrouted, node.terms):
        if term.g is not None or (term.key is not None and term.key.dims):
            raise Decline("a scale or a dropout per expert in ragged_dot")
        if term.a is None or term.b is None:
            continue
        labels = tuple(contracted if i == xc[0] else FREE + i for i in range(jnp.ndim(x)))
        h = dropped(term, Labelled(x, labels)).array
        a, b = (term.a, term.b) if contracted in term.a.dims else (term.b, term.a)
        for f, into, to in ((a, contracted, RANK), (b, RANK, out)):
            if set(f.dims) - {group, into, to}:
                raise Decline("factors of ragged_dot that span both sides")
            axis = xc[0] if into == contracted else jnp.ndim(x) - 1
            f = f.astype(h.dtype)
            if group in f.dims:
                dims = lax.RaggedDotDimensionNumbers((((axis,), (1,)), ((), ())), numbers.lhs_ragged_dimensions, (0,))
                h = lax.ragged_dot_general(h, f.spread((group, into, to)), sizes[0], dims,
                                           precision=eqn.params["precision"])
            else:
                h = lax.dot_general(h, f.spread((into, to)), (((axis,), (0,)), ((), ())),
                                    precision=eqn.params["precision"])
        y = y + term.scaled(h).astype(y.dtype)
    return y


RULES: dict[str, Any] = {"dot_general": dot_general, "conv_general_dilated": conv, "gather": gather,
                         "ragged_dot_general": ragged_dot, "ragged_dot": ragged_dot}
SHARED = {name: jax.jit(rule, static_argnums=(0, 4) if rule is dot_general else 0) for name, rule in RULES.items()}
"""The same rules as functions that equal layers share: traced and differentiated once, so that an unrolled model with
adapters has no more equations to differentiate than one without."""
