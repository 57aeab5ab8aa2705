"""The native library: found beside this file when the install had a compiler, loaded by ctypes, absent otherwise."""

import ctypes
import functools
import os
from importlib import resources

from ..checks import check_choice

ABI_VERSION = 1
CHOICES = ("auto", "reference", "native", "triton")


def requested() -> str:
    """What ``PAUCITY_KERNELS`` asks for: ``auto`` (the default), ``reference``, ``native`` or ``triton``."""
    choice = os.environ.get("PAUCITY_KERNELS", "auto")
    check_choice("kernels", "PAUCITY_KERNELS", choice, CHOICES)
    return choice


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded native library, or None when it was not built or was built for another version."""
    for entry in resources.files(__package__).iterdir():
        if entry.name.startswith("paucity_native.") and entry.is_file():
            with resources.as_file(entry) as path:
                loaded = ctypes.CDLL(str(path))
            loaded.paucity_instruction_set.restype = ctypes.c_char_p
            return loaded if loaded.paucity_abi_version() == ABI_VERSION else None
    return None


def status() -> dict[str, str]:
    """What is active, by name, for ``paucity info`` and the reports."""
    built = library()
    native = f"built, {built.paucity_instruction_set().decode()}" if built else "not built"
    return {"requested": requested(), "native": native, "sparse attention": "PyTorch tiles"}
