"""What a report was measured on: versions, processor, threads and kernels."""

import platform
from importlib import metadata
from pathlib import Path

from ..kernels import dispatch
from .schema import Environment


def environment() -> Environment:
    """The versions, processor, threads and active kernels of this process."""
    import torch

    return Environment(
        paucity=_version("paucity"),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=_version("transformers"),
        platform=platform.platform(),
        cpu=_cpu(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        threads=torch.get_num_threads(),
        kernels=dispatch.status(),
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    """The processor's name; Linux tells it in ``/proc/cpuinfo`` only."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
