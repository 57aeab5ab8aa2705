"""Which processor this is."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor's name; Linux tells it in ``/proc/cpuinfo`` only."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
