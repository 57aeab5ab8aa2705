"""Linears over some inputs or for some outputs as operators of torch, with gradients; which way each call runs.

The operators take tokens as rows: ``x [T, in]``. `dense_reason` is the one place that decides between the kernel and
the dense product of the masked input: where the layout does not fit, and, unless ``PAUCITY_KERNELS`` forces a twin,
where the kernel would lose.
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from . import reference

KERNEL = "sparse linear"
MAX_TOKENS = 16
"""More tokens than this run dense: together they keep nearly every input, and memory no longer limits the product."""
MAX_KEPT = 0.85
"""With a larger share kept, streaming the whole weight is as fast."""
MAX_KEPT_MANY = 0.6
"""The same for more than 8 tokens in half precision, where dense products have faster arithmetic than ours."""
MIN_WEIGHTS = 2**20
"""A smaller weight lies in a cache and takes no longer than a call."""


def is_input_major(weight: Tensor) -> bool:
    """Whether the weights of one input lie together in memory: ``stride(0) == 1``."""
    rows, cols = weight.shape
    return (rows <= 1 or weight.stride(0) == 1) and (cols <= 1 or weight.stride(1) >= rows)


def dense_reason(x: Tensor, weight: Tensor, fits: bool, layout: str) -> str | None:
    """Why a call runs dense before its mask is looked at, or None.

    Args:
        x: ``[T, in]``.
        weight: ``[out, in]``.
        fits: whether the weight is laid out as the kernel reads it.
        layout: the name of that layout.
    """
    if not fits:
        return f"the weight is not stored {layout}"
    if not x.shape[0]:
        return "there are no tokens"
    if dispatch.requested() != "auto":
        return None
    if dispatch.twin(KERNEL, x) == "reference":
        return f"no kernel takes {str(x.dtype).removeprefix('torch.')} here"
    if x.shape[0] > MAX_TOKENS:
        return f"more than {MAX_TOKENS} tokens"
    if weight.numel() < MIN_WEIGHTS:
        return "the weight is small"
    return None


def _wants_reference(x: Tensor) -> bool:
    """Whether the reference computes, slower than dense: it is forced, or a twin is that does not take ``x``."""
    return dispatch.requested() != "auto" and dispatch.twin(KERNEL, x) == "reference"


def _share(x: Tensor) -> float:
    if dispatch.requested() != "auto":
        return 1.0
    return MAX_KEPT_MANY if x.shape[0] > 8 and x.itemsize < 4 else MAX_KEPT


def _most(x: Tensor, size: int) -> int:
    return int(size * _share(x))


def _too_many(x: Tensor) -> None:
    dispatch.note_dense(KERNEL, f"more than {_share(x):.0%} kept")


def _masked(twin: ModuleType, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor | None:
    """The twin's `masked_input` of as many tokens as it takes at a time; None where too many inputs are kept."""
    most, pieces = _most(x, weight.shape[1]), []
    for piece, kept in zip(torch.split(x, MAX_TOKENS), torch.split(mask, MAX_TOKENS), strict=True):
        pieces.append(twin.masked_input(piece.contiguous(), weight, kept.contiguous(), bias, most))
    return None if any(piece is None for piece in pieces) else torch.cat(pieces)


@torch.library.custom_op("paucity::sparse_input_linear", mutates_args=())
def sparse_input(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, threshold: float | None, k: int | None
) -> tuple[Tensor, Tensor]:
    """See `reference.sparse_input`: ``(out, mask)``."""
    twin = dispatch.module(KERNEL, x, __package__)
    if _wants_reference(x):
        out, mask = reference.sparse_input(x, weight, bias, norm, threshold, k, weight.shape[1])
        return out, mask  # type: ignore[return-value]
    if reason := dense_reason(x, weight, is_input_major(weight), "input-major"):
        dispatch.note_dense(KERNEL, reason)
        mask = reference.select_inputs(x, norm, threshold, k)
        return F.linear(x.masked_fill(~mask, 0), weight, bias), mask
    if x.shape[0] > MAX_TOKENS:
        mask = reference.select_inputs(x, norm, threshold, k)
        out = _masked(twin, x, weight, mask, bias)
    else:
        out, mask = twin.sparse_input(x.contiguous(), weight, bias, norm, threshold, k, _most(x, weight.shape[1]))
    if out is None:
        _too_many(x)
        out = F.linear(x.masked_fill(~mask, 0), weight, bias)
    return out, mask


@torch.library.custom_op("paucity::masked_input_linear", mutates_args=())
def masked_input(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.masked_input`."""
    twin = dispatch.module(KERNEL, x, __package__)
    out: Tensor | None = None
    if _wants_reference(x):
        out = reference.masked_input(x, weight, mask, bias, weight.shape[1])
    elif reason := dense_reason(x, weight, is_input_major(weight), "input-major"):
        dispatch.note_dense(KERNEL, reason)
    else:
        out = _masked(twin, x, weight, mask, bias)
        if out is None:
            _too_many(x)
    return F.linear(x.masked_fill(~mask, 0), weight, bias) if out is None else out


@torch.library.custom_op("paucity::sparse_output_linear", mutates_args=())
def sparse_output(x: Tensor, weight: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.sparse_output`."""
    twin = dispatch.module(KERNEL, x, __package__)
    out: Tensor | None = None
    if _wants_reference(x):
        out = reference.sparse_output(x, weight, rows, bias, weight.shape[0])
    elif reason := dense_reason(x, weight, weight.shape[1] <= 1 or weight.stride(1) == 1, "output-major"):
        dispatch.note_dense(KERNEL, reason)
    else:
        most, pieces = _most(x, weight.shape[0]), []
        for piece, kept in zip(torch.split(x, MAX_TOKENS), torch.split(rows, MAX_TOKENS), strict=True):
            pieces.append(twin.sparse_output(piece.contiguous(), weight, kept.contiguous(), bias, most))
        if any(piece is None for piece in pieces):
            _too_many(x)
        else:
            out = torch.cat(pieces)
    return F.linear(x, weight, bias).masked_fill(~rows, 0) if out is None else out


@sparse_input.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, norm: Any, threshold: Any, k: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape, dtype=torch.bool)


@masked_input.register_fake
def _(x: Tensor, weight: Tensor, mask: Tensor, bias: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@sparse_output.register_fake
def _(x: Tensor, weight: Tensor, rows: Tensor, bias: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _input_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, weight and bias: ``(dy W) * mask``, ``dy^T (x * mask)`` and the sum of ``dy``."""
    x, weight, mask = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs
    return (
        (grad @ weight).masked_fill(~mask, 0) if needs_x else None,
        (x.masked_fill(~mask, 0).t() @ grad).t() if needs_weight else None,
        grad.sum(0) if needs_bias else None,
    )


def _save_selected(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight = inputs[:2]
    ctx.save_for_backward(x, weight, output[1])
    ctx.needs = ctx.needs_input_grad[:3]


def _selected_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_input_gradients(ctx, grad), None, None, None


def _save_masked(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, _ = inputs
    ctx.save_for_backward(x, weight, mask)
    ctx.needs = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3])


def _masked_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = _input_gradients(ctx, grad)
    return dx, dweight, None, dbias


def _output_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rows = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs
    grad = grad.masked_fill(~rows, 0)
    return (
        grad @ weight if needs_x else None,
        grad.t() @ x if needs_weight else None,
        None,
        grad.sum(0) if needs_bias else None,
    )


sparse_input.register_autograd(_selected_backward, setup_context=_save_selected)
masked_input.register_autograd(_masked_backward, setup_context=_save_masked)
sparse_output.register_autograd(_output_backward, setup_context=_save_masked)


def _flops(x: Tensor, weight: Tensor, mask: Tensor, size: int, fits: bool) -> int:
    """Of the product that ran: over the columns or rows that any token keeps, or over all of them."""
    other, tokens = weight.numel() // max(1, size), x.shape[0]
    runs_reference = _wants_reference(x)
    kept = tokens * size
    if (
        not isinstance(mask, FakeTensor)
        and not mask.is_meta
        and (runs_reference or not dense_reason(x, weight, fits, ""))
    ):
        pieces = (mask,) if runs_reference else torch.split(mask, MAX_TOKENS)
        counts = [int(piece.any(0).sum()) for piece in pieces]
        if runs_reference or max(counts) <= _most(x, size):
            kept = sum(len(piece) * count for piece, count in zip(pieces, counts, strict=True))
    return 2 * other * kept


@register_flop_formula(torch.ops.paucity.sparse_input_linear, get_raw=True)  # type: ignore[untyped-decorator]
def _sparse_input_flops(x: Tensor, weight: Tensor, *_: Any, out_val: tuple[Tensor, Tensor], **__: Any) -> int:
    return _flops(x, weight, out_val[1], weight.shape[1], is_input_major(weight))


@register_flop_formula(torch.ops.paucity.masked_input_linear, get_raw=True)  # type: ignore[untyped-decorator]
def _masked_input_flops(x: Tensor, weight: Tensor, mask: Tensor, *_: Any, **__: Any) -> int:
    return _flops(x, weight, mask, weight.shape[1], is_input_major(weight))


@register_flop_formula(torch.ops.paucity.sparse_output_linear, get_raw=True)  # type: ignore[untyped-decorator]
def _sparse_output_flops(x: Tensor, weight: Tensor, rows: Tensor, *_: Any, **__: Any) -> int:
    return _flops(x, weight, rows, weight.shape[0], weight.shape[1] <= 1 or weight.stride(1) == 1)
