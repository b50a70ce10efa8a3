"""How programs are compiled: once for all later runs, ahead of their use, with which of the flags of the compiler."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from lorajax.io.assets import cache_folder
from lorajax.train.footprint import bytes_of, step_bytes

T = TypeVar("T")

PRESETS = {"none": "", "quick": "--xla_gpu_enable_triton_gemm=false"}
"""Flags of XLA by name. quick: matrix products by cuBLAS alone, on a GPU; nothing is tuned, so programs compile in less
than half the time (the prototype of a 1.2 billion decoder on an H200: 12.2 s, then 4.6 s, and the same step)."""


def compiler_flags(flags: str) -> None:
    """Adds to XLA_FLAGS, behind which flags that are there already win. XLA reads them when JAX first uses a device:
    nothing before may have done so."""
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()


def compile_cache() -> None:
    """Turns JAX's persistent cache on, below `cache_folder()` unless JAX_COMPILATION_CACHE_DIR names a place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def wake() -> None:
    """Begins to use the devices, in a thread: on a GPU this takes seconds, in which data can be read. What fails here
    fails again, and is told, at their first use."""
    def begin() -> None:
        with contextlib.suppress(Exception):
            jax.device_put(0)

    threading.Thread(target=begin, name="wake").start()


class Ready:
    """A jitted function, and those of its programs that are compiled before they are asked for. waited: seconds that
    calls have waited for these."""

    def __init__(self, jitted: Any):
        self.jitted = jitted
        self.made: dict[Any, Future[Any]] = {}
        self.waited = 0.0

    def __call__(self, *args: Any) -> Any:
        made = self.made.get(_shapes(args))
        if made is None:
            return self.jitted(*args)
        if not made.done():
            began = time.monotonic()
            made.exception()  # waits
            self.waited += time.monotonic() - began
        return made.result()(*args)

    def ahead(self, pool: ThreadPoolExecutor, tracing: threading.Lock, *args: Any, here: bool = False) -> Future[Any]:
        """Compiles for arguments of these shapes (arrays, or `jax.ShapeDtypeStruct`s) in a thread of `pool`; a call
        that needs the program waits for it. tracing: held while Python traces, one function at a time; XLA compiles
        several. here: traces before it returns, so that nothing else takes Python's time from it."""
        key, shapes = _shapes(args), jax.tree.map(_abstract, args)  # arrays may be donated before the thread begins

        def lowered() -> Any:
            with tracing:
                return self.jitted.lower(*shapes)

        if key not in self.made:
            self.made[key] = pool.submit(lowered().compile if here else lambda: lowered().compile())
        return self.made[key]

    def bytes(self, *args: Any) -> int:
        """As `step_bytes`."""
        made = self.made.get(_shapes(args))
        return step_bytes(self.jitted, *args) if made is None else bytes_of(made.result())


class Ahead:
    """Threads that compile one run's programs while it begins and trains: `Ahead()(ready, *args)`. A context manager:
    what has not been begun at its end is left. workers: threads, 0 for as many as there are cores, 8 at most."""

    def __init__(self, workers: int = 0):
        self._pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1), thread_name_prefix="compile")
        self._tracing = threading.Lock()

    def __call__(self, ready: Ready, *args: Any, here: bool = False) -> Future[Any]:
        return ready.ahead(self._pool, self._tracing, *args, here=here)

    def beside(self, work: Callable[[], T]) -> Future[T]:
        """`work` in one of the threads, for what compiles programs of its own."""
        return self._pool.submit(work)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _abstract(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    where, weak = x.sharding if x.committed else None, getattr(x, "weak_type", False)  # keys have none
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where, weak_type=weak)


def _shapes(args: Any) -> Any:
    leaves, tree = jax.tree.flatten(args)
    return tree, *(x.shape for x in leaves)
