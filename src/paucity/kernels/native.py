"""The native library: found beside this file when the install had a compiler, loaded by ctypes, absent otherwise.

Every kernel is compiled once per instruction set. The best one that the machine has is taken; ``PAUCITY_ISA`` asks for
a lesser one (``plain``, ``avx2``, ``avx512``, ``avx512bf16``), to compare or to test.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, fail

ABI_VERSION = 2

INT, FLOAT = ctypes.c_int64, ctypes.c_float
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Pointer:
    """Argument type: the address of a contiguous tensor's data, of a ctypes structure or array, or None."""

    @classmethod
    def from_param(cls, value: "Tensor | ctypes.Structure | None") -> Any:
        """What ctypes passes."""
        if value is None:
            return None
        return ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else ctypes.byref(value)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded native library, or None when it was not built or was built for another version."""
    for entry in resources.files(__package__).iterdir():
        if entry.name.startswith("paucity_native.") and entry.is_file():
            with resources.as_file(entry) as path:
                loaded = ctypes.CDLL(str(path))
            loaded.paucity_instruction_sets.restype = ctypes.c_char_p
            return loaded if loaded.paucity_abi_version() == ABI_VERSION else None
    return None


def instruction_sets() -> list[str]:
    """What of the library this machine can run, best first; empty when it was not built."""
    built = library()
    return built.paucity_instruction_sets().decode().split() if built else []


def instruction_set() -> str:
    """The instruction set in use: the best one, or what ``PAUCITY_ISA`` names.

    Raises:
        InputError: if the library was not built, or ``PAUCITY_ISA`` names one that this machine or this build lacks.
    """
    sets = instruction_sets()
    if not sets:
        raise fail("kernels", "the native library", "be built", "none")
    chosen = os.environ.get("PAUCITY_ISA") or sets[0]
    check_choice("kernels", "PAUCITY_ISA", chosen, sets)
    return chosen


def function(name: str, *types: Any) -> Callable[..., int]:
    """The native function ``name``, looked up when it is first called, for the instruction set in use.

    Args:
        name: as given to ``PAUCITY_KERNEL`` in C++.
        types: of the arguments: `Pointer`, `INT`, `FLOAT`. The number of threads comes last and is added by itself.

    Returns:
        A function that returns the kernel's code: 0, or what was wrong before any data was touched.
    """

    @functools.cache
    def bound(asked: str | None) -> Callable[..., int]:
        entry = library()[f"paucity_{name}_{instruction_set()}"]  # type: ignore[index]
        entry.argtypes = [*types, INT]
        entry.restype = ctypes.c_int
        return entry

    def call(*args: Any) -> int:
        return bound(os.environ.get("PAUCITY_ISA"))(*args, torch.get_num_threads())

    return call
