"""What the machine is that a benchmark ran on."""

from __future__ import annotations


def cpu_name() -> str:
    """The processor's model, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return ""
