"""Where and when a number was measured, and the table it is shown in."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax


def setting() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
             ] if cpuinfo.exists() else []
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax")},
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def markdown(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    # Every row has the keys of the first.
    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows]
    return "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in where.items())])
