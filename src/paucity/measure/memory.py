"""Peak memory held by tensors."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from .tokens import device_of

MEGABYTE = 1_000_000


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the storages behind a model's parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_memory_mb(function: Callable[[], object], *, model: nn.Module | None = None) -> float:
    """Megabytes (10^6 bytes) held at the peak: the weights of ``model`` and what ``function`` adds to what is there.

    Other tensors that live before ``function`` starts, such as a second model, are not counted. On a CPU every
    allocation of PyTorch is counted by the profiler, the scratch inside operators included: the figure is the same in
    each run and does not depend on what the process did before. On a GPU it is the peak of the caching allocator.
    Memory that a library takes by itself (packing in BLAS) is not seen on either.

    Args:
        function: run once. Tensors from before that it frees are not deducted.
        model: whose parameters and buffers to add; None adds nothing.
    """
    held = 0 if model is None else weight_bytes(model)
    device = torch.device("cpu") if model is None else device_of(model)
    added = _cuda_peak(function, device) if device.type == "cuda" else _cpu_peak(function)
    return (held + added) / MEGABYTE


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a transformers cache holds, shared storages once."""
    seen: dict[int, int] = {}
    for layer in getattr(cache, "layers", ()):
        _storages(vars(layer), seen)
    return sum(seen.values())


def _storages(value: object, seen: dict[int, int]) -> None:
    """Storages of the tensors in nested containers and plain objects of ours."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict):
        for each in value.values():
            _storages(each, seen)
    elif isinstance(value, list | tuple):
        for each in value:
            _storages(each, seen)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("paucity."):
        _storages(vars(value), seen)


def _cuda_peak(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(function: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop lines would go to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    held = peak = 0
    events = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
