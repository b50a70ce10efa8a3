"""What a run asks of its mesh: the shardings of base, adapters, state and batches. Without a mesh it asks nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorajax.core.adapt import Adapt, Frozen
from lorajax.shard.follow import adapter_specs, state_specs
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

    def base(self, leaves: Mapping[str, Any]) -> dict[str, NamedSharding]:
        """path -> sharding of each base weight: what `lorajax.models.params_from_hf` asks for. leaves: path -> shape.
        Only with a mesh."""
        return {path: self._at(spec) for path, spec in self.specs(leaves).items()}

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

    def check(self, rows: int, what: str) -> None:
        """Raises MeshError where `rows` of a batch do not spread over the mesh."""
        said = {axis: self.sizes.get(axis, 1) for axis in BATCH}
        n = said["data"] * said["fsdp"]
        if rows % n:
            fits = max(1, round(rows / n)) * n
            raise MeshError(f"{what}={rows} does not divide among data {said['data']} x fsdp {said['fsdp']}: the "
                            f"nearest that does is {fits}")

    def batch(self, batch: Mapping[str, np.ndarray], lead: int = 0, trial: bool = False) -> Any:
        """A batch on the devices; each process copies the rows that its own hold."""
        sharding = self.rows(lead, trial)
        if sharding is None:
            return jax.device_put(batch)
        return {name: put(x, sharding) for name, x in batch.items()}

    def describe(self, leaves: Mapping[str, Any]) -> str:
        """The table of where every base weight lies."""
        return described(leaves, self.specs(leaves), self.sizes)

    def _at(self, spec: PartitionSpec) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, spec)

    def _named(self, tree: Any) -> Any:
        return jax.tree.map(self._at, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """A host array, the same in every process, as a global one."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
