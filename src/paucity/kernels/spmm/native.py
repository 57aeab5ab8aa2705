"""The C++ twin; see csrc/kernels/spmm.cpp. It checks the pattern before it reads or writes anything else."""

import torch
from torch import Tensor

from ...checks import fail
from ..native import DTYPES, INT, Pointer, function

_SIZES = (INT,) * 6
_spmm = function("spmm", *[Pointer] * 6, *_SIZES)
_spmm_transposed = function("spmm_transposed", *[Pointer] * 5, *_SIZES)
_sddmm = function("sddmm", *[Pointer] * 5, *_SIZES)


def spmm(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """As in the reference, for float32 and bfloat16."""
    batch, size, pixels = x.shape
    out = x.new_empty(batch, len(row_offsets) - 1, pixels)
    pattern, added = _pattern(values, columns, row_offsets), None if bias is None else bias.contiguous()
    sizes = (len(columns), batch, out.shape[1], size, pixels, DTYPES[x.dtype])
    _check(_spmm(*pattern, x.contiguous(), added, out, *sizes), size)
    return out


def spmm_transposed(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, size: int) -> Tensor:
    """As in the reference, for float32 and bfloat16."""
    batch, rows, pixels = x.shape
    out = x.new_empty(batch, size, pixels)
    pattern, sizes = _pattern(values, columns, row_offsets), (len(columns), batch, rows, size, pixels, DTYPES[x.dtype])
    _check(_spmm_transposed(*pattern, x.contiguous(), out, *sizes), size)
    return out


def sddmm(columns: Tensor, row_offsets: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """As in the reference, for float32 and bfloat16."""
    (batch, size, pixels), rows = x.shape, grad.shape[1]
    out = x.new_empty(len(columns))
    at, offsets, left, right = (each.contiguous() for each in (columns, row_offsets, grad, x))
    _check(_sddmm(at, offsets, left, right, out, len(columns), batch, rows, size, pixels, DTYPES[x.dtype]), size)
    return out


def _pattern(values: Tensor, columns: Tensor, row_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return values.to(torch.float32).contiguous(), columns.contiguous(), row_offsets.contiguous()


def _check(code: int, size: int) -> None:
    if code:
        raise fail("sparse_conv1x1", "weight", f"have ascending row offsets and columns in [0, {size})", "others")
