"""The operator ``paucity::add_gram``, which has no gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch

SUM = torch.float32


def zeros(rows: int, cols: int) -> Tensor:
    """``[rows, cols]`` of the dtype that sums are held in."""
    return torch.zeros(rows, cols, dtype=SUM)


@torch.library.custom_op("paucity::add_gram", mutates_args=("gram",))
def add_gram(gram: Tensor, inputs: Tensor) -> None:
    """See `reference.add`."""
    dispatch.module("gram", inputs, __package__).add(gram, inputs)


@add_gram.register_fake
def _(gram: Tensor, inputs: Tensor) -> None:
    return None


@register_flop_formula(torch.ops.paucity.add_gram, get_raw=True)  # type: ignore[untyped-decorator]
def _flops(gram: Tensor, inputs: Tensor, **_: Any) -> int:
    return inputs.shape[0] * inputs.shape[1] * (inputs.shape[1] + 1)
