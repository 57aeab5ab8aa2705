"""What the three primitives of sparse codes compute, slot by slot.

Sums run in float32 (float64 for float64 tensors), and the result is rounded once, to the dtype of the inputs. A value
of 0 adds nothing, whatever it would multiply. Indices are in range: the operators have checked them.
"""

import torch
from torch import Tensor


def gather_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """``out[t] = sum_j values[t, j] * table[indices[t, j]]``: ``[n, k], [n, k], [size, d] -> [n, d]``."""
    wide = torch.promote_types(values.dtype, torch.float32)
    out = torch.zeros(len(values), table.shape[1], dtype=wide, device=values.device)
    for value, index in zip(values.to(wide).unsqueeze(-1).unbind(1), indices.unbind(1), strict=True):
        out += torch.where(value == 0, 0, value * table[index])
    return out.to(values.dtype)


def gather_dot(x: Tensor, indices: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """``out[t, j] = x[t] . table[indices[t, j]] + bias[indices[t, j]]``.

    ``[n, d], [n, k], [size, d], [size] -> [n, k]``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(indices.shape, dtype=wide, device=x.device)
    for slot, index in enumerate(indices.unbind(1)):
        out[:, slot] = (x.to(wide) * table[index]).sum(-1)
    return (out if bias is None else out + bias[indices]).to(x.dtype)


def scatter_outer(values: Tensor, indices: Tensor, x: Tensor, size: int) -> Tensor:
    """``out[a] = sum of values[t, j] * x[t] where indices[t, j] = a``: ``[n, k], [n, k], [n, d] -> [size, d]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(size, x.shape[1], dtype=wide, device=x.device)
    for value, index in zip(values.to(wide).unsqueeze(-1).unbind(1), indices.unbind(1), strict=True):
        out.index_add_(0, index, torch.where(value == 0, 0, value * x))
    return out.to(x.dtype)


def gather_sum_backward(values: Tensor, indices: Tensor, table: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gather_sum` to values and table at once, given that of its result: ``[n, k], [size, d]``."""
    return gather_dot(grad, indices, table, None), scatter_outer(values, indices, grad, table.shape[0])
