"""The adapters on the device: a bank of fixed places, written while it serves, the least recently used gives way.

All have one form, (W + A B) diag(g) with A and B padded to one rank, so that the programs that read the bank never
change. LoRA and its starts, DoRA, AdaLoRA, VeRA and whatever else has factors (`lj.bank`) are of it exactly.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.adapt import adapt as make_adapt
from lorajax.core.bank import bank
from lorajax.core.bound import Bound, Factor, is_bound
from lorajax.core.layout import matrix, over_stack
from lorajax.core.sites import Sites
from lorajax.core.variant import Factors, Full, Leaf, Variant
from lorajax.variants.plain import restated


class Refused(ValueError):
    """An adapter that a mixed batch of this form cannot hold."""


class ScaledArrays(NamedTuple):
    """A: (in, r). B: (r, out), with every scale in it. g: (out,)."""

    A: Any
    B: Any
    g: Any


@dataclass(frozen=True)
class Scaled(Variant):
    """``W' = (W + A B) diag(g)``: the form of all adapters on the device. `init` is the one that changes nothing."""

    rank: int = 16

    leaves: ClassVar[Mapping[str, Leaf]] = {"A": Leaf("a", ("in", "rank")), "B": Leaf("b", ("rank", "out")),
                                            "g": Leaf("magnitude", ("out",))}
    any_rank = True

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[ScaledArrays, jax.Array]:
        n_in, n_out = w.shape
        return ScaledArrays(jnp.zeros((n_in, self.rank)), jnp.zeros((self.rank, n_out)), jnp.ones(n_out)), w

    def factors(self, adapter: ScaledArrays, w: Any) -> Factors:
        return Factors(adapter.A, adapter.B, adapter.g)


def scaled(form: Adapt, adapt: Adapt, trainable: Mapping[str, Any], frozen: Frozen) -> dict[str, ScaledArrays]:
    """An adapter of any kind in the form `form`, whose variants are all `Scaled`; on the host, float32.

    Raises Refused, saying what is in the way: a weight trained in full, an update without factors or with a router, a
    base that it rewrote, scales of a weight's inputs, a site that the form leaves out, a rank above its own.
    """
    found: dict[str, ScaledArrays] = {}
    for path, choice in adapt.plan.items():
        if isinstance(choice, Full):
            raise Refused(f"it trains {path} in full, and a mixed batch has one base: merge it into a base of its own "
                          f"and serve that")
        if not choice.factored or choice.routed or choice.rewrites_weight:
            why = ("has no low-rank factors" if not choice.factored else "weighs its update per token" if choice.routed
                   else "starts from another weight than the base")
            raise Refused(f"{path}: {type(choice).__name__} {why}, so it shares no program with others: write it as "
                          f"plain LoRA (lorajax.compose.as_lora), or merge it into a base of its own and serve that")
        other = form.plan.get(path)
        if not isinstance(other, Scaled):
            raise Refused(f"it adapts {path}, and this server holds adapters of {', '.join(list(form.plan)[:3])}, ...: "
                          f"start it with targets that cover both")
        found[path] = _one(form, path, other.rank, adapt, trainable, frozen)
    return {path: found.get(path, _nothing(like)) for path, like in form.shapes[0].items()}


def _nothing(like: ScaledArrays) -> ScaledArrays:
    return ScaledArrays(*[np.full(x.shape, fill, np.float32) for x, fill in zip(like, (0, 0, 1), strict=True)])


def _one(form: Adapt, path: str, rank: int, adapt: Adapt, trainable: Mapping[str, Any],
         frozen: Frozen) -> ScaledArrays:
    site, choice, like = adapt.sites[path], adapt.plan[path], form.shapes[0][path]
    assert isinstance(choice, Variant)
    halves = zip(trainable[path], frozen.aux.get(path, trainable[path]), strict=True)
    adapter = type(trainable[path])(*[other if x is None else x for x, other in halves])
    choice, adapter, _ = restated(choice, adapter)
    shared = adapt.shared(path, trainable, frozen)
    w = matrix(site, frozen.base[path]).astype(jnp.float32) if choice.reads_weight else None
    with jax.default_matmul_precision("highest"):
        f = over_stack(site, lambda x, w: choice.factors(x._replace(**shared), w).folded())(adapter, w)
    if f.g_in is not None:
        raise Refused(f"{path}: {type(choice).__name__} scales the inputs of this weight, and this server holds scales "
                      f"of outputs: merge it into a base of its own and serve that")
    a, b, g = (None if x is None else np.asarray(x, np.float32) for x in (f.a, f.b, f.g))
    if a is None or b is None:
        a, b = np.zeros((*like.A.shape[:-1], 0), np.float32), np.zeros((*like.B.shape[:-2], 0, like.B.shape[-1]),
                                                                       np.float32)
    if a.shape[-1] > rank:
        raise Refused(f"{path}: it has rank {a.shape[-1]}, and this server holds ranks up to {rank}: start it with "
                      f"--rank={a.shape[-1]}")
    a, b = (np.broadcast_to(x, (*site.stack_shape, *x.shape[-2:])) for x in (a, b))  # a shared one has no stack
    b = b if f.s is None else b * np.asarray(f.s, np.float32)[..., None, None]
    lead, more = [(0, 0)] * (a.ndim - 2), rank - a.shape[-1]
    return ScaledArrays(np.pad(a, [*lead, (0, 0), (0, more)]), np.pad(b, [*lead, (0, more), (0, 0)]),
                        np.ones(like.g.shape, np.float32) if g is None else np.broadcast_to(g, like.g.shape))


class Residents:
    """Which adapter is where in the bank. One thread calls its methods; files are read on others.

    sites, params: the base, and what of it can be adapted. read: an adapter's name (any hashable) -> (adapt, trainable,
    frozen). places: how many are on the device; memory: bytes for them, which then says how many. rank, targets: of
    the form, the largest rank and a preset or regex of the sites. `wake` is called, from another thread, when one has
    been read.
    """

    def __init__(self, sites: Sites, params: Any, read: Callable[[Any], tuple[Adapt, Mapping[str, Any], Frozen]], *,
                 places: int = 16, memory: int | None = None, rank: int = 16, targets: str = "all-linear"):
        self.form, self.wake = make_adapt(sites, [(targets, Scaled(rank))]), lambda: None
        self.places = places = places if memory is None else memory // self.size
        if places < 1:
            room = f"places={places}" if memory is None else f"{memory} bytes"
            raise ValueError(f"{room} hold no adapter of {self.size} bytes: raise it, or lower rank={rank}")
        self.frozen, self._read = self.form.frozen(params, {}), read
        self._blank = {path: _nothing(like) for path, like in self.form.shapes[0].items()}
        many = jax.tree.map(lambda x: np.broadcast_to(x, (places, *x.shape)), self._blank)
        self._terms = jax.jit(self._bank_of)(many)
        self.write = jax.jit(self._written, donate_argnums=0)
        """(terms, an adapter's arrays, place) -> terms: the one program that puts adapters on the device."""
        self.bank = self._bound()
        """The tree that `lorajax.mixed` takes in place of the base's parameters; `take` puts a new one here."""
        self._held: OrderedDict[Hashable, int] = OrderedDict()  # the least recently used first
        self._users: Counter[Hashable] = Counter()
        self._reading: dict[Hashable, Future[dict[str, ScaledArrays]]] = {}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="adapters")

    @property
    def size(self) -> int:
        """Bytes of one adapter on the device."""
        return sum(4 * int(np.prod(x.shape)) for x in jax.tree.leaves(self.form.shapes[0]))

    @property
    def held(self) -> tuple[Hashable, ...]:
        """What is on the device, the least recently used first."""
        return tuple(self._held)

    def ready(self, name: Hashable | None) -> bool:
        """Whether `take` would not wait; starts to read the adapter if not."""
        if name is None or name in self._held:
            return True
        if name not in self._reading:
            self._reading[name] = self._pool.submit(lambda: scaled(self.form, *self._read(name)))
            self._reading[name].add_done_callback(lambda _: self.wake())
        return self._reading[name].done()

    def forget(self, wanted: Collection[Hashable | None]) -> None:
        """Drops what has been read, or could not be, that nobody wants any more."""
        for name in [name for name, one in self._reading.items() if name not in wanted and one.done()]:
            del self._reading[name]

    def take(self, name: Hashable | None) -> int:
        """The adapter's place in the bank, -1 for None; it stays there until as many `give_back`. What reading it
        raised is raised here. RuntimeError if every place is taken."""
        if name is None:
            return -1
        if name not in self._held:
            out = next((x for x in self._held if not self._users[x]), None)
            full = len(self._held) == self.places
            if full and out is None:
                raise RuntimeError(f"all {self.places} places are taken")
            self.ready(name)
            arrays = self._reading.pop(name).result()
            place = self._held.pop(out) if full else len(self._held)
            self._terms = self.write(self._terms, arrays, np.int32(place))
            self.bank = self._bound()
            self._held[name] = place
        self._held.move_to_end(name)
        self._users[name] += 1
        return self._held[name]

    def give_back(self, name: Hashable | None) -> None:
        """One user less."""
        self._users -= Counter([name])  # those without users leave the counter

    def warm(self) -> None:
        """Compiles `write`."""
        if not self._held:
            self._terms = self.write(self._terms, self._blank, np.int32(0))
            self.bank = self._bound()

    def close(self) -> None:
        """Waits for what is being read."""
        self._pool.shutdown(cancel_futures=True)

    def _bound(self) -> Any:
        base = self.frozen.base
        leaves = base | {path: Bound(base[path], terms, path) for path, terms in self._terms.items()}
        return jax.tree.unflatten(self.form.sites.tree, [leaves[path] for path in self.form.sites.leaves])

    def _bank_of(self, many: Any) -> dict[str, Any]:
        """Path -> terms, of arrays with the adapters in front."""
        bound = jax.tree.leaves(bank(self.form, many, self.frozen), is_leaf=is_bound)
        return {str(node.path): node.terms for node in bound if is_bound(node)}

    def _written(self, terms: Any, arrays: Any, place: jax.Array) -> Any:
        def put(into: Factor, one: Factor) -> Factor:
            assert into.many is not None
            array = jax.lax.dynamic_update_slice_in_dim(into.stored, one.stored, place, into.many.axis)
            return Factor(array, into.dims, into.shape, into.many)

        one = self._bank_of(jax.tree.map(lambda x: jnp.asarray(x)[None], arrays))
        return jax.tree.map(put, terms, one, is_leaf=lambda x: isinstance(x, Factor))
