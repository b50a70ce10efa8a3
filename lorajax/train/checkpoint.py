"""Checkpoints of a run: `TrainState` plus the position in the data, written by orbax in the background, atomically.

A checkpoint is a folder `<step>/` that appears under its name only when it is complete, so a process killed at any
moment leaves the previous one usable. Arrays are stored under their dotted tree path (`trainable.<site>.a`), typed PRNG
keys as their key data; a table of leaves beside them lets `restore` name what a changed configuration changed.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationContext, PreservationPolicy


class CheckpointMismatch(ValueError):
    """The checkpoint holds another state than the one asked for: another configuration wrote it."""


class Checkpoints:
    """The checkpoints under one folder: the newest `keep` ones and the best one stay, older ones are deleted.

    Opening removes what an interrupted save left behind. Use as a context manager, or call `close`.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep}: at least the newest checkpoint must be kept")
        self._policy = _NewestAndBest(keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._policy, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)
        self._policy.best = max(filter(self._marked, self._manager.all_steps()), default=None)

    def save(self, step: int, state: Any, position: dict[str, Any], best: bool = False) -> None:
        """Starts saving and returns when `state` may be donated; a failure of the previous save is raised here.

        state: any pytree of arrays. position: what JSON can hold: where the data stands, the best score so far, ...
        best: this is the best state so far; it replaces the former best one.
        A step that is saved already is left as it is: save once per step, after its evaluation.
        """
        self._manager.check_for_errors()
        if step in self._manager.all_steps():
            return
        arrays, table = _describe(state)
        if best:
            self._policy.best = step
        keys = {name: str(jax.random.key_impl(x)) for name, x in _named(state).items() if _is_key(x)}
        record = ocp.args.JsonSave({"position": position, "best": best, "leaves": table, "keys": keys})
        filled = {name: x for name, x in arrays.items() if x.size}  # tensorstore takes no empty arrays
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(filled), record=record))

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the checkpoint last saved with `best=True`, None if there is none."""
        return self._policy.best

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """(state, position) of `step`, by default the newest, bit for bit as saved.

        like: a state of the same structure, shapes and dtypes (arrays, or ShapeDtypeStructs); each array is restored
        with the sharding of its counterpart. Raises CheckpointMismatch naming the leaves that differ, and
        FileNotFoundError if there is no such checkpoint.
        """
        self.wait()
        there = sorted(self._manager.all_steps())
        step = self.latest() if step is None else step
        if step is None or step not in there:
            asked = "a checkpoint" if step is None else f"step {step}"
            raise FileNotFoundError(f"asked for {asked} in {self._manager.directory}; there is {there or 'none'}")
        record = self._record(step)
        arrays, table = _describe(like)
        _compare(record["leaves"], table, f"{self._manager.directory}/{step}")
        wanted = {name: _abstract(x) for name, x in arrays.items() if x.size}
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))["state"]
        values = []
        for name, x in arrays.items():
            empty = jnp.zeros(x.shape, x.dtype, device=getattr(x, "sharding", None)) if not x.size else None
            value = restored[name] if empty is None else empty
            impl = record["keys"].get(name)
            values.append(value if impl is None else jax.random.wrap_key_data(value, impl=impl))
        return jax.tree.unflatten(jax.tree.structure(like), values), record["position"]

    def wait(self) -> None:
        """Blocks until every save is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the last save and releases the threads."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def _marked(self, step: int) -> bool:
        """Whether `step` was saved as the best; a folder whose deletion was interrupted was not."""
        try:
            return self._record(step)["best"]
        except (FileNotFoundError, KeyError, ValueError):
            return False


class _NewestAndBest(PreservationPolicy):
    """Keeps the newest `n` checkpoints and the one at step `best`."""

    def __init__(self, n: int):
        self.n = n
        self.best: int | None = None

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        newest = {info.step for info in checkpoints[-self.n:]}
        return [info.step in newest or info.step == self.best for info in checkpoints]


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _named(state: Any) -> dict[str, Any]:
    """{dotted tree path: leaf} in the order of the leaves. Raises TypeError on anything but arrays."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in named:
            raise ValueError(f"two leaves of the state are called {name!r}: rename one")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray):
            raise TypeError(f"{name} is a {type(leaf).__name__}: a state holds arrays only, wrap it in jnp.asarray")
        named[name] = leaf
    return named


def _describe(state: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """({name: array}, {name: 'dtype[shape]'}); typed keys become their uint32 data in the first."""
    named = _named(state)
    data = {name: _key_data(x) if _is_key(x) else x for name, x in named.items()}
    return data, {name: f"{x.dtype}{list(x.shape)}" for name, x in named.items()}


def _key_data(key: Any) -> Any:
    return jax.random.key_data(key) if isinstance(key, jax.Array) else jax.eval_shape(jax.random.key_data, key)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _compare(saved: dict[str, str], asked: dict[str, str], where: str) -> None:
    """Raises CheckpointMismatch that lists, leaf by leaf, how `asked` differs from `saved`."""
    lines = []
    for name, kind in asked.items():
        if name not in saved:
            near = difflib.get_close_matches(name, saved.keys() - asked.keys(), 1)
            lines.append(f"{name} {kind} is not in the checkpoint" + (f" (nearest there: {near[0]})" if near else ""))
        elif saved[name] != kind:
            lines.append(f"{name} is {saved[name]} in the checkpoint, {kind} in this run")
    lines += [f"{name} {saved[name]} is only in the checkpoint" for name in saved if name not in asked]
    if lines:
        more = [f"... and {len(lines) - 8} more"] if len(lines) > 8 else []
        head = f"the checkpoint {where} was written by another configuration:"
        way_out = "restore that configuration, or start in a fresh run folder"
        raise CheckpointMismatch("\n  ".join([head, *lines[:8], *more, way_out]))
