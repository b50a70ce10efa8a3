"""One program on several processes: how they find each other, what one of them does alone, and what they agree on.

Everything that moves between processes goes through `jax.distributed` and compiled collectives.
"""

from __future__ import annotations

import importlib.util
import itertools
import linecache
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from lorajax.shard.mesh import MeshError

HEARTBEAT = 30
"""Seconds of silence after which a process counts as dead."""
FLAGS: dict[str, Any] = {"coordinator": "", "processes": 0, "process": -1}
"""An experiment's own flags, see `start`."""


class ProcessLost(RuntimeError):
    """Another process of the program is gone; this one cannot go on."""


def start(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Joins the other processes; does nothing where there is only this one. Before anything else uses JAX.

    coordinator: ``host:port`` of process 0. processes: how many there are. process: which this is, from 0. What is not
    given comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without these JAX finds
    all of them by itself on TPU pods, under SLURM's `srun` and under Open MPI's `mpirun` (since Open MPI 5 through the
    package mpi4py).
    From here on only process 0 prints on stdout.
    Raises MeshError where some are given and others are missing, mpi4py among them.
    """
    env = os.environ.get
    coordinator = coordinator or env("JAX_COORDINATOR_ADDRESS", "")
    processes = processes or int(env("JAX_NUM_PROCESSES", "0"))
    process = process if process >= 0 else int(env("JAX_PROCESS_ID", "-1"))
    given = {"coordinator": bool(coordinator), "processes": processes > 0, "process": process >= 0}
    how: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT}
    if any(given.values()):
        if processes == 1:
            return
        missing = [name for name, there in given.items() if not there]
        if missing:
            raise MeshError(f"several processes need coordinator (host:port of process 0), processes and process, and "
                            f"{', '.join(missing)} is missing: give --{missing[0]}=... or JAX_COORDINATOR_ADDRESS, "
                            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID")
        if process >= processes:
            raise MeshError(f"process={process} of processes={processes}: they count from 0 to {processes - 1}")
        how |= {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    elif not _cluster():
        return
    elif "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ:  # since Open MPI 5
        if importlib.util.find_spec("mpi4py") is None:
            raise MeshError("this Open MPI's mpirun tells JAX no address: pip install mpi4py, which asks it, or give "
                            "--coordinator=host:port, --processes and --process")
        how |= {"cluster_detection_method": "mpi4py"}
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(**how)
        if not writes():
            sys.stdout = open(os.devnull, "w")


def _cluster() -> bool:
    """Whether the environment is one of several processes that JAX recognises by itself."""
    tasks = max(int(os.environ.get(name, "1")) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    tpu = importlib.util.find_spec("libtpu") is not None and any(map(Path.exists, map(Path, _TPU)))
    return tasks > 1 or (tpu and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu"))


_TPU = ("/dev/accel0", "/dev/vfio/0")


def several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def writes() -> bool:
    """Whether this process writes what only one writes: process 0."""
    return jax.process_index() == 0


def agreed(value: int) -> int:
    """Process 0's value, in every process; all must ask."""
    if not several():
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait(name: str) -> None:
    """Until every process is here."""
    if several():
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """A tree of arrays with those that are spread over processes as NumPy arrays, whole, everywhere; all must ask."""
    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
        return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(x))

    return jax.tree.map(whole, tree)


_asked = itertools.count()


def leaving() -> bool:
    """Whether all processes are to save and leave now: one of them got a preemption notice (SIGTERM), and this is the
    first time of asking that none has passed. Every process asks at every step; until there is a notice, nothing is
    sent."""
    return several() and multihost_utils.reached_preemption_sync_point(next(_asked))


@contextmanager
def together() -> Iterator[None]:
    """Turns what the loss of another process does to this one's collectives into ProcessLost. (Where a collective waits
    for ever, JAX itself ends the process once the heartbeats have been missed, and says so.)"""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if several() and re.search(_LOST, str(error), re.IGNORECASE):
            raise ProcessLost(f"process {jax.process_index()} of {jax.process_count()} stops, for another one of them "
                              f"is gone: start all of them again with the same command, and they go on from the last "
                              f"checkpoint ({str(error).splitlines()[0][:200]})") from error
        raise


_LOST = r"gloo|connection (closed|reset)|heartbeat|coordination service|unavailable|nccl|unhealthy"


def run(main: Callable[[list[str]], None], explained: tuple[type[BaseException], ...]) -> None:
    """`main` on the command line's words, with `explained` errors and what our code says of bad input as one line. A
    process of several that fails ends at once: an ordinary exit would wait for the others, which wait for it."""
    try:
        with together():
            main(sys.argv[1:])
        return
    except SystemExit as error:
        if error.code in (None, 0, 75) or not jax.distributed.is_initialized():
            raise
        said = str(error.code)
    except BaseException as error:
        if isinstance(error, (*explained, ProcessLost)) or _told(error):
            said = f"error: {error}"
        elif not jax.distributed.is_initialized():
            raise
        else:
            said = traceback.format_exc()
    if not jax.distributed.is_initialized():
        raise SystemExit(said)
    print(said, file=sys.stderr, flush=True)
    os._exit(1)


def _told(error: BaseException) -> bool:
    # Whether a `raise` of ours made this, of bad input or a missing extra: made by others, or by mistake, it needs its
    # traceback.
    if not isinstance(error, (ValueError, ImportError)) or error.__traceback__ is None:
        return False
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    ours = re.match(r"(lorajax|experiments|configs?_?|__main__)", frame.f_globals.get("__name__", ""))
    return bool(ours) and linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
