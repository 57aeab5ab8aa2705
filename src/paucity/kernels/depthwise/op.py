"""The operator ``paucity::depthwise``, with a fake implementation, gradients and a count of its FLOPs."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from ..linear.packed_op import is_plain

KERNEL = "depthwise convolution"


@dispatch.without_autocast
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """See `paucity.kernels.depthwise.depthwise_conv`."""
    out: Tensor = dispatch.module(KERNEL, x, __package__).depthwise(x, weight, bias, stride, padding)
    return out


depthwise = torch.library.custom_op("paucity::depthwise", mutates_args=())(_depthwise)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """`depthwise`, called without the dispatcher where that makes no difference."""
    plain = is_plain(x, bias) and not (torch.is_grad_enabled() and weight.requires_grad)
    out: Tensor = (_depthwise if plain else depthwise)(x, weight, bias, stride, padding)
    return out


@depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    places = [
        (size + 2 * padding - kernel) // stride + 1 for size, kernel in zip(x.shape[2:], weight.shape[2:], strict=True)
    ]
    return x.new_empty(*x.shape[:2], *places)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.stride, ctx.padding = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and ctx.biased]
    sizes = [x.shape[1]] if ctx.biased else None
    stride, padding = [ctx.stride] * 2, [ctx.padding] * 2
    d_x, d_weight, d_bias = torch.ops.aten.convolution_backward(
        grad.contiguous(), x, weight, sizes, stride, padding, [1, 1], False, [0, 0], x.shape[1], needs
    )
    return d_x if needs[0] else None, d_weight if needs[1] else None, d_bias if needs[2] else None, None, None


depthwise.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.paucity.depthwise)  # type: ignore[untyped-decorator]
def _flops(x: tuple[int, ...], weight: tuple[int, ...], *_: Any, out_shape: tuple[int, ...], **__: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[2:])
