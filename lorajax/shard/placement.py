"""What a run asks of its mesh: the shardings of base, adapters, state and batches. Without a mesh it asks nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.packed import is_packed
from lorajax.shard.follow import REPLICATED, adapter_specs, laid, state_specs
from lorajax.shard.mesh import BATCH, MeshError
from lorajax.shard.rules import REST, Rule, described, present, specs


@dataclass(frozen=True)
class Placement:
    """mesh: of `make_mesh`, None for one device: then every sharding here is None, which is what `jax.jit` takes for
    "as it comes", and arrays go to the default device. rules, defaults: of `lorajax.shard.rules.specs`."""

    mesh: Mesh | None = None
    rules: tuple[Rule, ...] = ()
    defaults: tuple[Rule, ...] = field(default=(REST,))

    @property
    def sizes(self) -> dict[str, int]:
        """Devices of each axis."""
        return {} if self.mesh is None else dict(self.mesh.shape)

    def base(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """path -> sharding of each base weight: what `lorajax.models.params_from_hf` asks for; of a quantised one a
        tree of them. leaves: path -> shape. Only with a mesh."""
        found = self.specs(leaves)
        return self._named({path: laid(path, w, found[path], self.sizes) for path, w in leaves.items()})

    def put(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The base's weights where they belong. A quantised one is gathered along `fsdp` as codes, not unpacked."""
        where = None if self.mesh is None else self.base(leaves)
        moved = {path: jax.device_put(w, jax.devices()[0] if where is None else where[path])
                 for path, w in leaves.items()}
        return self.gathering(moved)

    def gathering(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """`leaves`, arrays or shapes that lie here already; the quantised ones know it. One that is moved elsewhere by
        other means than `put` has to be told again."""
        found, stay = self.specs(leaves), {**self.sizes, "fsdp": 1}
        return {path: w.gathering(self.mesh, [present(entry, stay) for entry in found[path]]) if is_packed(w) else w
                for path, w in leaves.items()}

    def specs(self, leaves: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        """path -> PartitionSpec of the base's weights."""
        return specs(leaves, self.sizes, self.rules, self.defaults)

    def adapters(self, adapt: Adapt) -> Any:
        """Shardings of `adapt.init`'s result: of all that it makes. A base weight that it hands on stays where it
        is."""
        if self.mesh is None:
            return None
        trainable, frozen = adapter_specs(adapt, self.specs(adapt.sites.leaves), self.sizes)
        made = {path for path, choice in adapt.plan.items() if getattr(choice, "rewrites_weight", False)}
        kept: Any = {path: spec if path in made else None for path, spec in frozen.base.items()}
        return self._named((trainable, Frozen(kept, frozen.aux, frozen.shared)))

    def state(self, adapt: Adapt, state: Any) -> Any:
        """Shardings of a training state; state: arrays or shapes."""
        if self.mesh is None:
            return None
        trainable, _ = adapter_specs(adapt, self.specs(adapt.sites.leaves), self.sizes)
        return self._named(state_specs(state, adapt.shapes[0], trainable))

    def pack(self, adapt: Adapt, packed: Any) -> Any:
        """Shardings of (state, own frozen arrays, numbers), whose dimension 0 is the runs of a pack: each run's part
        lies as that run's would, on its share of the devices."""
        if self.mesh is None:
            return None
        state, own, values = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), packed)
        trainable, frozen = adapter_specs(adapt, self.specs(adapt.sites.leaves), self.sizes)
        shapes = adapt.shapes
        found = (state_specs(state, shapes[0], trainable), state_specs(own, shapes[1].aux, frozen.aux),
                 jax.tree.map(lambda _: REPLICATED, values))
        trial = present("trial", self.sizes)
        return self._named(jax.tree.map(lambda spec: PartitionSpec(trial, *spec), found, is_leaf=_is_spec))

    @property
    def whole(self) -> NamedSharding | None:
        """The sharding of what every device holds whole: metrics, predictions."""
        return None if self.mesh is None else self._at(PartitionSpec())

    def rows(self, lead: int = 0, trial: bool = False) -> NamedSharding | None:
        """The sharding of a batch's arrays whose rows are dimension `lead`; trial: dimension 0 is the runs of a
        pack."""
        if self.mesh is None:
            return None
        front = [present("trial", self.sizes) if trial and i == 0 else None for i in range(lead)]
        return self._at(PartitionSpec(*front, present(BATCH, self.sizes)))

    def held(self, rows: int) -> np.ndarray:
        """Which of the rows of a batch this process' devices hold, ascending. Raises MeshError where they do not spread
        over the mesh."""
        sharding = self.rows()
        if sharding is None:
            return np.arange(rows)
        n = math.prod(self.sizes[axis] for axis in BATCH)
        if rows % n:
            said = " x ".join(f"{axis} {self.sizes[axis]}" for axis in BATCH)
            raise MeshError(f"a batch of {rows} rows does not divide among {said}: the nearest that does is "
                            f"{max(1, round(rows / n)) * n}")
        places = sharding.addressable_devices_indices_map((rows,)).values()
        return np.unique(np.concatenate([np.arange(rows)[index] for index in places]))

    def share(self, rows: int, accumulate: int = 1) -> np.ndarray:
        """The same of a batch of `accumulate` micro-batches, each spread over the mesh; MeshError if they do not divide
        it."""
        micro, rest = divmod(rows, accumulate)
        if rest:
            raise MeshError(f"accumulate={accumulate} does not divide a batch of {rows} rows: the nearest that it does "
                            f"is {max(1, round(rows / accumulate)) * accumulate}")
        return (np.arange(accumulate)[:, None] * micro + self.held(micro)).reshape(-1)

    def batch(self, batch: Mapping[str, np.ndarray], lead: int = 0, rows: int | None = None,
              trial: bool = False) -> Any:
        """A batch on the devices. Its rows are dimension `lead`: all of them, or where `rows` says how many there are
        this process' `held(rows)`. trial: dimension 0 is the runs of a pack."""
        sharding = self.rows(lead, trial)
        if sharding is None:
            return jax.device_put(batch)
        return {name: self._put(np.asarray(x), sharding, lead, rows) for name, x in batch.items()}

    def _put(self, x: np.ndarray, sharding: NamedSharding, lead: int, rows: int | None) -> jax.Array:
        held = self.held(x.shape[lead] if rows is None else rows)

        def part(index: Any) -> np.ndarray:
            if rows is None:
                return x[index]
            start, stop, _ = index[lead].indices(rows)
            first = int(np.searchsorted(held, start))
            return x[(*index[:lead], slice(first, first + stop - start), *index[lead + 1:])]

        shape = (*x.shape[:lead], x.shape[lead] if rows is None else rows, *x.shape[lead + 1:])
        return jax.make_array_from_callback(shape, sharding, part)

    def adopt(self, adapt: Adapt, made: Any) -> Any:
        """What `adapt.init` would have made, read from elsewhere, where it belongs; `made`: (trainable, frozen)."""
        where = self.adapters(adapt)
        if where is None:
            return made
        put = lambda x, at: x if at is None else jax.device_put(x, at)  # noqa: E731
        (trainable, frozen), (to, rest) = made, where
        return (jax.tree.map(put, trainable, to),
                Frozen({path: put(x, rest.base[path]) for path, x in frozen.base.items()},
                       jax.tree.map(put, frozen.aux, rest.aux), jax.tree.map(put, frozen.shared, rest.shared)))

    def describe(self, leaves: Mapping[str, Any]) -> str:
        """The table of where every base weight lies."""
        return described(leaves, self.specs(leaves), self.sizes)

    def _at(self, spec: PartitionSpec) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, spec)

    def _named(self, tree: Any) -> Any:
        return jax.tree.map(self._at, tree, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


LOCAL = Placement()
"""One device."""
