"""What a report was measured on: versions, processor, threads and kernels."""

import platform
from importlib import metadata

from ..kernels import dispatch
from ..kernels.cpu import cpu_name
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
        cpu=cpu_name(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        threads=torch.get_num_threads(),
        kernels=dispatch.status(),
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
