"""The operators ``paucity::topk``, ``topk_mask``, ``threshold_select`` and ``statistical_topk`` on rows.

Gradients reach the selected entries through the values; the choice has none.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch


def _twin(tensor: Tensor) -> ModuleType:
    return dispatch.module("selection", tensor, __package__)


@torch.library.custom_op("paucity::topk", mutates_args=())
def topk(x: Tensor, k: int, by_abs: bool) -> tuple[Tensor, Tensor]:
    """``[rows, n] -> [rows, k], [rows, k]``; see `reference.topk`."""
    values, indices = _twin(x).topk(x, k, by_abs)
    return values, indices


@torch.library.custom_op("paucity::topk_mask", mutates_args=())
def topk_mask(x: Tensor, k: int, by_abs: bool) -> Tensor:
    """``[rows, n] -> [rows, n]``; see `reference.topk_mask`."""
    mask: Tensor = _twin(x).topk_mask(x, k, by_abs)
    return mask


@torch.library.custom_op("paucity::threshold_select", mutates_args=())
def threshold_select(x: Tensor, threshold: Tensor, capacity: int, by_abs: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``[rows, n], [rows] -> [rows, capacity], [rows, capacity], [rows]``; see `reference.threshold_select`."""
    values, indices, counts = _twin(x).threshold_select(x, threshold, capacity, by_abs)
    return values, indices, counts


@torch.library.custom_op("paucity::statistical_topk", mutates_args=())
def statistical_topk(x: Tensor, k: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[rows, n] -> [rows, capacity], [rows, capacity], [rows]``; see `reference.statistical_topk`."""
    values, indices, counts = _twin(x).statistical_topk(x, k, capacity)
    return values, indices, counts


@topk.register_fake
def _(x: Tensor, k: int, by_abs: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


@topk_mask.register_fake
def _(x: Tensor, k: int, by_abs: bool) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)


@threshold_select.register_fake
def _(x: Tensor, threshold: Tensor, capacity: int, by_abs: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_slots(x, capacity)


@statistical_topk.register_fake
def _(x: Tensor, k: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_slots(x, capacity)


def _fake_slots(x: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    indices = x.new_empty(rows, capacity, dtype=torch.int32)
    return x.new_empty(rows, capacity), indices, x.new_empty(rows, dtype=torch.int32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1])
    ctx.size, ctx.inputs = inputs[0].shape[1], len(inputs)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    unused = indices < 0
    row = grad.new_zeros(len(indices), ctx.size)
    row = row.scatter_add(-1, indices.masked_fill(unused, 0).long(), grad.masked_fill(unused, 0))
    return row, *[None] * (ctx.inputs - 1)


for _op in (topk, threshold_select, statistical_topk):
    _op.register_autograd(_backward, setup_context=_keep)


def _no_products(*_: Any, **__: Any) -> int:
    return 0


for _name in ("topk", "topk_mask", "threshold_select", "statistical_topk"):
    register_flop_formula(getattr(torch.ops.paucity, _name), get_raw=True)(_no_products)
