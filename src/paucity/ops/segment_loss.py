"""A loss over many rows, computed segment by segment, so that what is large inside of it is never there for all rows.

The gradient of a segment is taken as soon as its loss is known and what its forward held is dropped: the peak is that
of one segment, and nothing is computed twice. Made for the logits of a large vocabulary over a long text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_int, check_ndim, check_shape

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""From rows ``[n, D]`` and their labels ``[n]`` to the sum of their losses."""


def segment_loss(
    loss: RowLoss, rows: Tensor, labels: Tensor, *, segment: int, parameters: Sequence[Tensor] = ()
) -> Tensor:
    """``loss(rows, labels)``, differentiable once, with the memory of ``segment`` rows.

    Args:
        loss: a sum over rows, each of which counts for itself.
        rows: ``[N, D]`` float.
        labels: ``[N]``, whatever ``loss`` takes.
        segment: rows in a segment, at least 1.
        parameters: what else ``loss`` computes with and should get gradients; held once more, as gradients.

    Returns:
        A scalar float32.

    Raises:
        InputError: if ``segment`` is no positive integer or the shapes do not fit.

    Examples:
        >>> x = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
        >>> segment_loss(lambda rows, labels: (rows[:, 0] * labels).square().sum(), x, torch.ones(3), segment=2)
        tensor(14., grad_fn=<_SegmentsBackward>)
    """
    check_int("segment_loss", "segment", segment)
    check_ndim("segment_loss", "rows", rows, 2)
    check_shape("segment_loss", "labels", labels, rows.shape[0])
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (rows.requires_grad or wanted):
        pairs = zip(torch.split(rows, segment), torch.split(labels, segment), strict=True)
        parts = [loss(part, target).float() for part, target in pairs]
        return torch.stack(parts).sum() if parts else rows.new_zeros((), dtype=torch.float32)
    total: Tensor = _Segments.apply(loss, segment, labels, rows, *wanted)  # type: ignore[no-untyped-call]
    return total


class _Segments(torch.autograd.Function):
    """Loss and gradients together in the forward; the backward only scales."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, loss: RowLoss, segment: int, labels: Tensor, rows: Tensor, *parameters: Tensor
    ) -> Tensor:
        total = rows.new_zeros((), dtype=torch.float32)
        grad_rows = torch.empty_like(rows) if rows.requires_grad else None
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        for first in range(0, len(rows), segment):
            part = rows[first : first + segment].detach().requires_grad_(grad_rows is not None)
            with torch.enable_grad():
                value = loss(part, labels[first : first + segment])
            total += value.detach().float()
            inputs = [part, *parameters] if grad_rows is not None else list(parameters)
            found = list(torch.autograd.grad(value, inputs, allow_unused=True)) if value.requires_grad else []
            if grad_rows is not None:
                grad_rows[first : first + segment] = 0 if not found or found[0] is None else found[0]
                found = found[1:]
            for grad, more in zip(grads, found, strict=False):
                if more is not None:
                    grad += more
        ctx.has_rows = grad_rows is not None
        ctx.save_for_backward(*([] if grad_rows is None else [grad_rows]), *grads)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = [tensor * grad.to(tensor.dtype) for tensor in ctx.saved_tensors]
        rows = [] if ctx.has_rows else [None]
        return (None, None, None, *rows, *saved)
