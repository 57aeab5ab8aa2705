"""What the products of a sparse matrix with channels-first inputs compute, through the dense matrix.

The matrix is given as compressed sparse rows: ``values [num_nonzeros]``, ``columns`` and ``row_offsets [out + 1]``
(int32). Sums run in float32 (float64 for float64), and the result is rounded once, to the dtype of the inputs.
"""

import torch
from torch import Tensor


def spmm(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """``out[b] = W x[b] + bias``: ``x [B, in, P]``, ``bias [out] -> [B, out, P]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = dense(values.to(wide), columns, row_offsets, x.shape[1]) @ x.to(wide)
    return (out if bias is None else out + bias.unsqueeze(-1)).to(x.dtype)


def spmm_transposed(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, size: int) -> Tensor:
    """``out[b] = W^T x[b]``: ``x [B, out, P] -> [B, size, P]``, where W has ``size`` columns."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (dense(values.to(wide), columns, row_offsets, size).T @ x.to(wide)).to(x.dtype)


def sddmm(columns: Tensor, row_offsets: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """The entries of ``sum_b grad[b] x[b]^T`` at the pattern: ``[B, out, P], [B, in, P] -> [num_nonzeros]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = torch.arange(grad.shape[1], device=x.device).repeat_interleave(row_offsets.diff().long())
    product = torch.einsum("bop,bip->oi", grad.to(wide), x.to(wide))
    return product[rows, columns.long()].to(x.dtype)


def dense(values: Tensor, columns: Tensor, row_offsets: Tensor, size: int) -> Tensor:
    """The matrix ``[out, size]`` with its zeros."""
    out = len(row_offsets) - 1
    rows = torch.arange(out, device=values.device).repeat_interleave(row_offsets.diff().long())
    return values.new_zeros(out, size).index_put_((rows, columns.long()), values)
