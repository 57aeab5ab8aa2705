"""The operators ``paucity::gather_sum`` (and its backward), ``paucity::gather_dot`` and ``paucity::scatter_outer``.

Each is linear in each of its float inputs and its gradients are the two others, so all can be differentiated any number
of times.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...checks import fail
from .. import dispatch


def _twin(tensor: Tensor) -> ModuleType:
    return dispatch.module("codes", tensor, __package__)


def _check_indices(function: str, indices: Tensor, size: int) -> None:
    if indices.numel():
        low, high = (int(end) for end in indices.aminmax())
        if low < 0 or high >= size:
            raise fail(function, "indices", f"be in [0, {size})", low if low < 0 else high)


@torch.library.custom_op("paucity::gather_sum", mutates_args=())
def gather_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """``[n, k], [n, k], [size, d] -> [n, d]``; see `reference.gather_sum`."""
    _check_indices("decode_codes", indices, table.shape[0])
    out: Tensor = _twin(values).gather_sum(values, indices, table)
    return out


@torch.library.custom_op("paucity::gather_dot", mutates_args=())
def gather_dot(x: Tensor, indices: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """``[n, d], [n, k], [size, d], [size] -> [n, k]``; see `reference.gather_dot`."""
    _check_indices("encode_kept", indices, table.shape[0])
    out: Tensor = _twin(x).gather_dot(x, indices, table, bias)
    return out


@torch.library.custom_op("paucity::scatter_outer", mutates_args=())
def scatter_outer(values: Tensor, indices: Tensor, x: Tensor, size: int) -> Tensor:
    """``[n, k], [n, k], [n, d] -> [size, d]``; see `reference.scatter_outer`."""
    _check_indices("scatter_outer", indices, size)
    out: Tensor = _twin(values).scatter_outer(values, indices, x, size)
    return out


@torch.library.custom_op("paucity::gather_sum_backward", mutates_args=())
def gather_sum_backward(values: Tensor, indices: Tensor, table: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients in one pass over the rows of ``grad``; see `reference.gather_sum_backward`."""
    _check_indices("decode_codes", indices, table.shape[0])
    d_values, d_table = _twin(values).gather_sum_backward(values, indices, table, grad)
    return d_values, d_table


@gather_sum.register_fake
def _(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    return values.new_empty(values.shape[0], table.shape[1])


@gather_dot.register_fake
def _(x: Tensor, indices: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(indices.shape)


@scatter_outer.register_fake
def _(values: Tensor, indices: Tensor, x: Tensor, size: int) -> Tensor:
    return x.new_empty(size, x.shape[1])


@gather_sum_backward.register_fake
def _(values: Tensor, indices: Tensor, table: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), table.new_empty(table.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _gather_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, table = ctx.saved_tensors
    grad = grad.contiguous()
    if ctx.needs_input_grad[0] and ctx.needs_input_grad[2]:
        d_values, d_table = gather_sum_backward(values, indices, table, grad)
        return d_values, None, d_table
    d_values = gather_dot(grad, indices, table, None) if ctx.needs_input_grad[0] else None
    d_table = scatter_outer(values, indices, grad, table.shape[0]) if ctx.needs_input_grad[2] else None
    return d_values, None, d_table


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gather_sum_double_backward(ctx: Any, to_values: Tensor, to_table: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, table, grad = ctx.saved_tensors
    to_values, to_table = to_values.contiguous(), to_table.contiguous()
    d_grad = gather_sum(to_values, indices, table) + gather_sum(values, indices, to_table)
    d_table = scatter_outer(to_values, indices, grad, table.shape[0])
    return gather_dot(grad, indices, to_table, None), None, d_table, d_grad


def _gather_dot_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, indices, table = ctx.saved_tensors
    grad, needs = grad.contiguous(), ctx.needs_input_grad
    d_x = gather_sum(grad, indices, table) if needs[0] else None
    d_table = scatter_outer(grad, indices, x, table.shape[0]) if needs[2] else None
    ones = x.new_ones(len(x), 1)
    d_bias = scatter_outer(grad, indices, ones, table.shape[0]).squeeze(-1) if needs[3] else None
    return d_x, None, d_table, d_bias


def _scatter_outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, x = ctx.saved_tensors
    grad = grad.contiguous()
    d_values = gather_dot(x, indices, grad, None) if ctx.needs_input_grad[0] else None
    d_x = gather_sum(values, indices, grad) if ctx.needs_input_grad[2] else None
    return d_values, None, d_x, None


gather_sum.register_autograd(_gather_sum_backward, setup_context=_keep)
gather_sum_backward.register_autograd(_gather_sum_double_backward, setup_context=_keep_all)
gather_dot.register_autograd(_gather_dot_backward, setup_context=_keep)
scatter_outer.register_autograd(_scatter_outer_backward, setup_context=_keep)


@register_flop_formula(torch.ops.paucity.gather_sum, get_raw=True)  # type: ignore[untyped-decorator]
def _gather_sum_flops(values: Tensor, indices: Tensor, table: Tensor, *_: Any, **__: Any) -> int:
    return 2 * values.numel() * table.shape[1]


@register_flop_formula(torch.ops.paucity.gather_sum_backward, get_raw=True)  # type: ignore[untyped-decorator]
def _gather_sum_backward_flops(values: Tensor, indices: Tensor, table: Tensor, *_: Any, **__: Any) -> int:
    return 4 * values.numel() * table.shape[1]


@register_flop_formula(torch.ops.paucity.gather_dot, get_raw=True)  # type: ignore[untyped-decorator]
def _gather_dot_flops(x: Tensor, indices: Tensor, table: Tensor, *_: Any, **__: Any) -> int:
    return 2 * indices.numel() * table.shape[1]


@register_flop_formula(torch.ops.paucity.scatter_outer, get_raw=True)  # type: ignore[untyped-decorator]
def _scatter_outer_flops(values: Tensor, indices: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    return 2 * values.numel() * x.shape[1]
