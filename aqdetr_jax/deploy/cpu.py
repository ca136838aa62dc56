"""What a CPU is, and how much of it a process may use."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from aqdetr_jax.host import cores

INTEGER_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "sve"),  # ARM
)
"""Instruction sets that decide how fast products of bytes are."""


def cpu_facts() -> dict[str, Any]:
    """Model, instruction sets for products of bytes, cores that this process may use, and load."""
    info = Path("/proc/cpuinfo")
    fields = _fields(info.read_text(errors="replace")) if info.is_file() else {}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "flags": [flag for flag in INTEGER_FLAGS if flag in flags],
        "cores": cores(),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def _fields(text: str) -> dict[str, str]:
    """Of the first processor of ``/proc/cpuinfo``."""
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def can_limit_cores() -> bool:
    """Whether this system lets a process be kept on some of the cores."""
    return hasattr(os, "sched_setaffinity")


def limit_cores(count: int) -> None:
    """Keeps this process, and threads that it starts later, on its first ``count`` cores.

    So a limit holds for every runtime, whatever it makes of its own settings.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if count < len(allowed):
        os.sched_setaffinity(0, allowed[:count])


def peak_bytes() -> int:
    """Largest resident size of this process so far.

    Not ``getrusage`` on Linux: there a process begins with what its parent had.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
