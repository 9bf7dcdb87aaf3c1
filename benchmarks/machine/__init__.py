"""What the machine is that a benchmark ran on."""

from __future__ import annotations

import resource
import sys


def cpu_name() -> str:
    """The processor's model, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return ""


def peak_mib() -> float:
    """Largest resident memory of this process so far.

    `ru_maxrss` begins at what the process that started this one held, so it is asked for where nothing else is there.
    """
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
