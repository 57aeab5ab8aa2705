"""The C++ twin; see csrc/kernels/codes.cpp."""

import torch
from torch import Tensor

from ..native import DTYPES, INT, Pointer, function

_SIZES = (INT, INT, INT, INT, INT)
_gather_sum = function("gather_sum", *[Pointer] * 4, *_SIZES)
_gather_dot = function("gather_dot", *[Pointer] * 5, *_SIZES)
_scatter_outer = function("scatter_outer", *[Pointer] * 4, *_SIZES)

_gather_sum_backward = function("gather_sum_backward", *[Pointer] * 6, *_SIZES)


def gather_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """As in the reference, for float32 and bfloat16."""
    (n, k), (size, d) = values.shape, table.shape
    out = values.new_empty(n, d)
    at, slots = indices.to(torch.int32).contiguous(), values.contiguous()
    _gather_sum(slots, at, table.contiguous(), out, n, k, size, d, DTYPES[values.dtype])
    return out


def gather_dot(x: Tensor, indices: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """As in the reference, for float32 and bfloat16."""
    (n, k), (size, d) = indices.shape, table.shape
    out = x.new_empty(n, k)
    at, added = indices.to(torch.int32).contiguous(), None if bias is None else bias.contiguous()
    _gather_dot(x.contiguous(), at, table.contiguous(), added, out, n, k, size, d, DTYPES[x.dtype])
    return out


def scatter_outer(values: Tensor, indices: Tensor, x: Tensor, size: int) -> Tensor:
    """As in the reference, for float32 and bfloat16; each row of the result is summed in the order of the tokens."""
    (n, k), d = values.shape, x.shape[1]
    out = x.new_empty(size, d)
    at, slots = indices.to(torch.int32).contiguous(), values.contiguous()
    _scatter_outer(slots, at, x.contiguous(), out, n, k, size, d, DTYPES[x.dtype])
    return out


def gather_sum_backward(values: Tensor, indices: Tensor, table: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """As in the reference, for float32 and bfloat16; each row of ``grad`` is read once for both."""
    (n, k), (size, d) = values.shape, table.shape
    d_values, d_table = values.new_empty(n, k), table.new_empty(size, d)
    at, slots, rows = indices.to(torch.int32).contiguous(), values.contiguous(), grad.contiguous()
    _gather_sum_backward(slots, at, table.contiguous(), rows, d_values, d_table, n, k, size, d, DTYPES[values.dtype])
    return d_values, d_table
