"""The operator ``paucity::column_sweep``; it is for pruning, which has no gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch


@torch.library.custom_op("paucity::column_sweep", mutates_args=())
def column_sweep(weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.sweep`."""
    twin = dispatch.module("column sweep", weight, __package__)
    swept, kept, errors = twin.sweep(weight, factor, mask, n, m)
    return swept, kept, errors


@column_sweep.register_fake
def _(weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool), torch.empty_like(weight)


@register_flop_formula(torch.ops.paucity.column_sweep, get_raw=True)  # type: ignore[untyped-decorator]
def _flops(weight: Tensor, *_: Any, **__: Any) -> int:
    return weight.shape[1] * weight.shape[0] * (weight.shape[0] - 1)
