"""Where the device's time goes in a step: JAX's own profile, summed by kind of kernel.

Kinds go by the names of kernels: products (cuBLAS and the like), attention (cuDNN's fused), copies, and the rest, which
XLA has fused itself. Idle is what no kernel covers between the first and the last.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

KINDS = {
    "attention": r"(?i)flash|fmha|sdpa|attention",
    "products": r"(?i)gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|triton_dot|^dot",
    "copies": r"(?i)memcpy|copy|memset|transpose",
}


def where(call: Callable[[], Any], steps: int, calls: int = 3, most: int = 30) -> dict[str, Any]:
    """Milliseconds of a step: `kinds`, `idle`, and `largest`, the kernels that take longest with how often they run,
    equal names with other numbers together. steps: of one call."""
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                out = call()
            jax.block_until_ready(out)
        file = next(Path(folder).rglob("*.xplane.pb"))
        found = list(events(jax.profiler.ProfileData.from_file(str(file))))
    each: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for name, begin, end in found:
        plain = re.sub(r"[._]\d+", "", name)
        each[plain] += 1
        times[plain] += end - begin  # type: ignore[assignment]  # nanoseconds, perhaps with a fraction
    kinds: Counter[str] = Counter()
    for name, ns in times.items():
        kinds[next((kind for kind, regex in KINDS.items() if re.search(regex, name)), "fused")] += ns
    ms = 1e-6 / (calls * steps)
    return {"kinds": {kind: ns * ms for kind, ns in kinds.most_common()}, "idle": idle(found) * ms,
            "largest": [[name[:90], ns * ms, each[name] / (calls * steps)] for name, ns in times.most_common(most)]}


def events(profile: Any) -> Iterator[tuple[str, float, float]]:
    """(name, begin, end) of what ran on the first GPU, in nanoseconds; on a CPU, of the operations of XLA."""
    gpu = next((plane for plane in profile.planes if plane.name.startswith("/device:GPU:")), None)
    for plane in profile.planes if gpu is None else [gpu]:
        for line in plane.lines:
            if gpu is not None and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                if gpu is not None or any(key == "hlo_op" for key, _ in event.stats):
                    yield event.name, event.start_ns, event.start_ns + event.duration_ns


def idle(found: list[tuple[str, float, float]]) -> float:
    """What is covered by none of the events between the first and the last."""
    gaps, until = 0.0, None
    for _, begin, end in sorted(found, key=lambda event: event[1]):
        gaps += max(0.0, begin - until) if until is not None else 0.0
        until = end if until is None else max(until, end)
    return gaps
