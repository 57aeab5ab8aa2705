"""The operators ``paucity::add_gram`` and ``paucity::add_squares``, which have no gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch

SUM, TOTAL = torch.float32, torch.float64


def zeros(rows: int, cols: int) -> Tensor:
    """``[rows, cols]`` of the dtype that sums are held in."""
    return torch.zeros(rows, cols, dtype=SUM)


@torch.library.custom_op("paucity::add_gram", mutates_args=("gram",))
def add_gram(gram: Tensor, inputs: Tensor) -> None:
    """See `reference.add`."""
    dispatch.module("gram", inputs, __package__).add(gram, inputs)


@torch.library.custom_op("paucity::add_squares", mutates_args=("squares",))
def add_squares(squares: Tensor, inputs: Tensor) -> None:
    """See `reference.add_squares`."""
    dispatch.module("gram", inputs, __package__).add_squares(squares, inputs)


@add_squares.register_fake
def _(squares: Tensor, inputs: Tensor) -> None:
    return None


@add_gram.register_fake
def _(gram: Tensor, inputs: Tensor) -> None:
    return None


@register_flop_formula(torch.ops.paucity.add_gram, get_raw=True)  # type: ignore[untyped-decorator]
def _flops(gram: Tensor, inputs: Tensor, **_: Any) -> int:
    return inputs.shape[0] * inputs.shape[1] * (inputs.shape[1] + 1)


@register_flop_formula(torch.ops.paucity.add_squares, get_raw=True)  # type: ignore[untyped-decorator]
def _square_flops(squares: Tensor, inputs: Tensor, **_: Any) -> int:
    return 2 * inputs.shape[0] * inputs.shape[1]
