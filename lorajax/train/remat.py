"""The cheapest rematerialisation that fits a device, by what XLA says of the compiled step.

What the backward pass computes again costs time and saves memory. `POLICIES` are the models' (`Execution.remat`),
cheapest first; no number of a run depends on which it is, up to rounding.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from lorajax.shard import hosts
from lorajax.train.footprint import device_bytes, step_bytes

POLICIES = ("none", "attention", "full")
ROOM = 0.9
"""Of a device's memory: the rest is for evaluation, for batches on their way, and for what the runtime takes."""


class TooLarge(ValueError):
    """The step fits the device under no policy."""


def fitting(
    make: Callable[[str], Any], args: Sequence[Any], limit: float | None = None, policies: Sequence[str] = POLICIES
) -> tuple[str, dict[str, int]]:
    """(the first of `policies` with which the step needs at most `limit` bytes of a device, the bytes of those tried).

    make: policy -> the jitted step; args: what it is called with, the longest batch among it. Each is compiled, and the
    one chosen is found in JAX's caches when it runs. limit: None for `ROOM` of the device's memory, of the host's where
    the device does not say (CPU). Where the backend counts no memory, the first fits. Raises TooLarge if none does.
    """
    limit = ROOM * memory() if limit is None else limit
    needs: dict[str, int] = {}
    for policy in policies:
        needs[policy] = step_bytes(make(policy), *args)
        if needs[policy] <= limit:
            return policy, needs
    told = ", ".join(f"{policy} {gib(n)}" for policy, n in needs.items())
    raise TooLarge(f"the step needs more than {gib(limit)} of memory whatever is computed again ({told}): make batch "
                   f"or max_length smaller, accumulate larger, scan_layers=true, quant.format=nf4, or spread the "
                   f"weights over more devices (mesh.fsdp)")


def fitted(asked: str, gigabytes: float, model: Any, make: Callable[[Any], Any], args: Callable[[], Any]) -> Any:
    """`model`, or where 'auto' is `asked` the model with the policy that `fitting` finds and prints.

    model: a NamedTuple with a Linen module `net`, which has `config.remat`. make: model -> the jitted step. args: what
    it is called with. gigabytes: of a device, in 2^30 bytes, 0 for `ROOM` of what it has.
    """
    if asked != "auto":
        return model

    def remade(policy: str) -> Any:
        return model._replace(net=model.net.clone(config=dataclasses.replace(model.net.config, remat=policy)))

    limit = gigabytes * 2**30 if gigabytes else ROOM * memory()
    policy, needs = fitting(lambda policy: make(remade(policy)), args(), limit)
    print(f"remat={policy}: of {gib(limit)} the step needs " + ", ".join(f"{gib(n)} ({p})" for p, n in needs.items()))
    return remade(policy)


def memory() -> int:
    """Bytes, in whole MiB, of process 0's first device, or of its host where that does not say: processes that chose by
    their own could run different programs."""
    return hosts.agreed((device_bytes() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) >> 20) << 20


def gib(n: float) -> str:
    """Bytes as text."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**27 else f"{n / 2**20:.2f} MiB"
