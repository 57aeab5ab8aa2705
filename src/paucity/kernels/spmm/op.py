"""The operators ``paucity::spmm``, ``paucity::spmm_transposed`` and ``paucity::sddmm``: W x, W^T x, and x y^T at W.

Each is linear in each of its float inputs and its gradients are the others, so all can be differentiated any number of
times. Where the matrix is too dense for the native kernels to win, they multiply the dense matrix.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...checks import fail
from .. import dispatch
from ..linear.packed_op import is_plain
from . import native, reference

# Density above which PyTorch's dense product is faster than the native kernels, measured at 256 -> 256 channels.
DENSE_ABOVE = {torch.float32: 0.4, torch.bfloat16: 0.3}


def _twin(columns: Tensor, row_offsets: Tensor, x: Tensor, size: int) -> ModuleType:
    twin = dispatch.module("sparse convolution", x, __package__)
    if twin is native:
        return native  # checks the pattern itself
    inside = not columns.numel() or bool((columns.min() >= 0) & (columns.max() < size))
    if not inside or row_offsets[[0, -1]].tolist() != [0, len(columns)] or (row_offsets.diff() < 0).any():
        raise fail("sparse_conv1x1", "weight", f"have ascending row offsets and columns in [0, {size})", "others")
    return twin


def _runs_dense(columns: Tensor, row_offsets: Tensor, x: Tensor, size: int) -> bool:
    density = len(columns) / max(1, (len(row_offsets) - 1) * size)
    if dispatch.requested() != "auto" or density <= DENSE_ABOVE.get(x.dtype, 1.0) or x.device.type != "cpu":
        return False
    dispatch.note_dense("sparse convolution", f"a density of {density:.2f} is above {DENSE_ABOVE[x.dtype]}")
    return True


@dispatch.without_autocast
def _spmm(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """``[nnz], [nnz], [out + 1], [B, in, P], [out] -> [B, out, P]``; see `reference.spmm`."""
    twin = _twin(columns, row_offsets, x, x.shape[1])
    if _runs_dense(columns, row_offsets, x, x.shape[1]):
        product = reference.dense(values, columns, row_offsets, x.shape[1]) @ x
        return product if bias is None else product.add_(bias.unsqueeze(-1))
    out: Tensor = twin.spmm(values, columns, row_offsets, x, bias)
    return out


spmm = torch.library.custom_op("paucity::spmm", mutates_args=())(_spmm)


def run(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`spmm`, called without the dispatcher where that makes no difference."""
    plain = is_plain(x, bias) and not (torch.is_grad_enabled() and values.requires_grad)
    out: Tensor = (_spmm if plain else spmm)(values, columns, row_offsets, x, bias)
    return out


@torch.library.custom_op("paucity::spmm_transposed", mutates_args=())
@dispatch.without_autocast
def spmm_transposed(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, size: int) -> Tensor:
    """``[nnz], [nnz], [out + 1], [B, out, P] -> [B, size, P]``; see `reference.spmm_transposed`."""
    twin = _twin(columns, row_offsets, x, size)
    if _runs_dense(columns, row_offsets, x, size):
        return reference.dense(values, columns, row_offsets, size).T @ x
    out: Tensor = twin.spmm_transposed(values, columns, row_offsets, x, size)
    return out


@torch.library.custom_op("paucity::sddmm", mutates_args=())
@dispatch.without_autocast
def sddmm(columns: Tensor, row_offsets: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """``[nnz], [out + 1], [B, out, P], [B, in, P] -> [nnz]``; see `reference.sddmm`."""
    twin = _twin(columns, row_offsets, x, x.shape[1])
    out: Tensor = twin.sddmm(columns, row_offsets, grad, x)
    return out


@spmm.register_fake
def _(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], row_offsets.shape[0] - 1, x.shape[2])


@spmm_transposed.register_fake
def _(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, size: int) -> Tensor:
    return x.new_empty(x.shape[0], size, x.shape[2])


@sddmm.register_fake
def _(columns: Tensor, row_offsets: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(columns.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _spmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, columns, row_offsets, x = ctx.saved_tensors
    grad, needs = grad.contiguous(), ctx.needs_input_grad
    d_values = sddmm(columns, row_offsets, grad, x) if needs[0] else None
    d_x = spmm_transposed(values, columns, row_offsets, grad, x.shape[1]) if needs[3] else None
    return d_values, None, None, d_x, grad.sum((0, 2)) if needs[4] else None


def _spmm_transposed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, columns, row_offsets, x = ctx.saved_tensors
    grad, needs = grad.contiguous(), ctx.needs_input_grad
    d_values = sddmm(columns, row_offsets, x, grad) if needs[0] else None
    d_x = spmm(values, columns, row_offsets, grad, None) if needs[3] else None
    return d_values, None, None, d_x, None


def _sddmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    columns, row_offsets, left, x = ctx.saved_tensors
    grad, needs = grad.contiguous(), ctx.needs_input_grad
    d_left = spmm(grad, columns, row_offsets, x, None) if needs[2] else None
    d_x = spmm_transposed(grad, columns, row_offsets, left, x.shape[1]) if needs[3] else None
    return None, None, d_left, d_x


spmm.register_autograd(_spmm_backward, setup_context=_keep)
spmm_transposed.register_autograd(_spmm_transposed_backward, setup_context=_keep)
sddmm.register_autograd(_sddmm_backward, setup_context=_keep)


def _flops(columns: Tensor, row_offsets: Tensor, x: Tensor, size: int) -> int:
    dense = _runs_dense(columns, row_offsets, x, size)
    entries = (len(row_offsets) - 1) * size if dense else len(columns)
    return 2 * entries * x.shape[0] * x.shape[2]


@register_flop_formula(torch.ops.paucity.spmm, get_raw=True)  # type: ignore[untyped-decorator]
def _spmm_flops(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    return _flops(columns, row_offsets, x, x.shape[1])


@register_flop_formula(torch.ops.paucity.spmm_transposed, get_raw=True)  # type: ignore[untyped-decorator]
def _spmm_transposed_flops(
    values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, size: int, *_: Any, **__: Any
) -> int:
    return _flops(columns, row_offsets, x, size)


@register_flop_formula(torch.ops.paucity.sddmm, get_raw=True)  # type: ignore[untyped-decorator]
def _sddmm_flops(columns: Tensor, row_offsets: Tensor, grad: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    return 2 * len(columns) * x.shape[0] * x.shape[2]
