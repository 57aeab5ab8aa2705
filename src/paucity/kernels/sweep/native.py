"""The C++ twin; see csrc/kernels/column_sweep.cpp."""

import torch
from torch import Tensor

from ..native import INT, Pointer, function

_sweep = function("column_sweep", *[Pointer] * 4, *[INT] * 5)


def sweep(weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """As in the reference, for float32."""
    weight = weight.clone(memory_format=torch.contiguous_format)
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.contiguous().clone()
    errors = torch.empty_like(weight)
    if weight.numel():
        held = factor if factor.stride(1) == 1 else factor.contiguous()
        _sweep(weight, kept, errors, held, *weight.shape, held.stride(0), n, m)
    return weight, kept, errors
