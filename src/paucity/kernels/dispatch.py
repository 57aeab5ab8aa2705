"""Which twin of a kernel computes: native C++ on the CPU, Triton on a GPU, the PyTorch reference everywhere else.

``PAUCITY_KERNELS`` is ``auto`` (the default), ``reference``, ``native`` or ``triton``. A twin that is asked for and is
not there is an error; one that does not take a dtype or a device leaves it to the reference.
"""

import functools
import importlib
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ..checks import InputError, InputTypeError, check_choice, check_floating, fail
from . import native

CHOICES = ("auto", "reference", "native", "triton")
_HALVES = (torch.float32, torch.bfloat16)
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Kernel:
    """The dtypes that the twins of a kernel take; the reference takes every float dtype, or bool where they do."""

    native: tuple[torch.dtype, ...] = _HALVES
    triton: tuple[torch.dtype, ...] = (*_HALVES, torch.float16)


KERNELS: dict[str, Kernel] = {
    "codes": Kernel(),
    "column sweep": Kernel((torch.float32,), ()),
    "decode attention": Kernel(),
    "depthwise convolution": Kernel(triton=()),
    "gram": Kernel(triton=()),
    "lines": Kernel((torch.bool, *_HALVES), (torch.bool, *_HALVES, torch.float16)),
    "matching pursuit": Kernel(triton=()),
    "packed linear": Kernel(),
    "selection": Kernel(),
    "sparse attention": Kernel(),
    "sparse convolution": Kernel(),
    "sparse linear": Kernel(),
    "tree search": Kernel(triton=()),
}


def requested() -> str:
    """What ``PAUCITY_KERNELS`` asks for."""
    choice = os.environ.get("PAUCITY_KERNELS") or "auto"
    check_choice("kernels", "PAUCITY_KERNELS", choice, CHOICES)
    return choice


def twin(kernel: str, tensor: Tensor) -> str:
    """``native``, ``triton`` or ``reference``: which twin of ``kernel`` (one of `KERNELS`) computes on ``tensor``.

    Raises:
        InputError: if ``PAUCITY_KERNELS`` asks for a twin that this machine lacks.
    """
    return _twin(kernel, tensor.device.type, tensor.dtype)


def module(kernel: str, tensor: Tensor, package: str | None) -> ModuleType:
    """The twin that `twin` names, as the module of that name in ``package``, the caller's ``__package__``."""
    return _module(twin(kernel, tensor), package)


@functools.cache
def _module(name: str, package: str | None) -> ModuleType:
    return importlib.import_module(f".{name}", package)


def check_devices(function: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Raise InputError unless all ``tensors`` (by argument; None is left out) are on ``device``.

    PyTorch asks an operator for shapes alone where any of its tensors has no data; the result of the others is garbage.
    """
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise fail(function, argument, f"be on {device}", tensor.device)


def check_computable(function: str, argument: str, tensor: Tensor) -> None:
    """Raise InputTypeError unless ``tensor`` has a floating dtype of at least 16 bits; narrower ones only store."""
    check_floating(function, argument, tensor)
    if tensor.element_size() == 1:
        raise InputTypeError(f"{function}: {argument} must have at least 16 bits, got {tensor.dtype}.")


def without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function`` (the first argument is a tensor) with autocast off: kernels compute in the dtypes they are given."""

    @functools.wraps(function)
    def exact(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = args[0].device.type if args and isinstance(args[0], Tensor) else "cpu"
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return exact


def _twin(kernel: str, device: str, dtype: torch.dtype) -> str:
    choice, takes = requested(), KERNELS[kernel]
    if choice == "native" and native.library() is None:
        raise InputError("kernels: PAUCITY_KERNELS must name what is there, got native, which was not built.")
    if choice == "triton" and not has_triton():
        raise InputError("kernels: PAUCITY_KERNELS must name what is there, got triton, which is not installed.")
    if choice in ("auto", "native") and device == "cpu" and dtype in takes.native and native.library():
        return "native"
    runs_triton = device == "cuda" or (choice == "triton" and interprets_triton())
    if choice in ("auto", "triton") and runs_triton and dtype in takes.triton and has_triton():
        return "triton"
    return "reference"


@functools.cache
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interprets_triton() -> bool:
    """Whether Triton's interpreter is on (``TRITON_INTERPRET=1``), which runs its kernels on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def status() -> dict[str, str]:
    """What is active, by name, for ``paucity info`` and the reports."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    built = ", ".join(native.instruction_sets())
    facts = {"requested": requested(), "native": f"built ({built})" if built else "not built"}
    facts["triton"] = "not installed" if not has_triton() else "interpreter" if interprets_triton() else "installed"
    for kernel in KERNELS:
        chosen = _twin(kernel, device, torch.bfloat16)
        facts[kernel] = f"native, {native.instruction_set()}" if chosen == "native" else chosen
    return facts


_dense: ContextVar[Counter[str] | None] = ContextVar("_dense", default=None)


@contextmanager
def dense_runs() -> Iterator[Counter[str]]:
    """Collect, by reason, how often a kernel ran dense because sparse would lose."""
    counter = Counter[str]()
    token = _dense.set(counter)
    try:
        yield counter
    finally:
        _dense.reset(token)


def note_dense(kernel: str, reason: str) -> None:
    """Count that ``kernel`` ran dense, and why."""
    counter = _dense.get()
    if counter is not None:
        counter[f"{kernel} ran dense: {reason}"] += 1
