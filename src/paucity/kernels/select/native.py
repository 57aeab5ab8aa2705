"""The C++ twin; see csrc/kernels/select.cpp."""

import math
import statistics

import torch
from torch import Tensor

from ..native import DTYPES, FLOAT, INT, Pointer, function

_topk = function("topk", *[Pointer] * 3, INT, INT, INT, INT, INT)
_topk_mask = function("topk_mask", *[Pointer] * 2, INT, INT, INT, INT, INT)
_threshold_select = function("threshold_select", *[Pointer] * 5, FLOAT, INT, INT, INT, INT, INT)


def topk(x: Tensor, k: int, by_abs: bool) -> tuple[Tensor, Tensor]:
    """As in the reference, for float32 and bfloat16."""
    values, indices = x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int32)
    _topk(x.contiguous(), values, indices, *x.shape, k, by_abs, DTYPES[x.dtype])
    return values, indices


def topk_mask(x: Tensor, k: int, by_abs: bool) -> Tensor:
    """As in the reference, for float32 and bfloat16."""
    mask = torch.empty(x.shape, dtype=torch.bool)
    _topk_mask(x.contiguous(), mask, *x.shape, k, by_abs, DTYPES[x.dtype])
    return mask


def threshold_select(x: Tensor, threshold: Tensor, capacity: int, by_abs: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As in the reference, for float32 and bfloat16."""
    return _select(x, threshold.contiguous(), 0.0, capacity, by_abs)


def statistical_topk(x: Tensor, k: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """As in the reference, for float32 and bfloat16; mean and deviation are summed in another order than there."""
    sparsity = 1 - k / max(1, x.shape[1])
    deviations = statistics.NormalDist().inv_cdf(sparsity) if sparsity else -math.inf
    return _select(x, None, deviations, capacity, False)


def _select(
    x: Tensor, threshold: Tensor | None, deviations: float, capacity: int, by_abs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = len(x)
    values, indices = x.new_empty(rows, capacity), x.new_empty(rows, capacity, dtype=torch.int32)
    counts = x.new_empty(rows, dtype=torch.int32)
    data = x.contiguous()
    _threshold_select(data, threshold, values, indices, counts, deviations, *x.shape, capacity, by_abs, DTYPES[x.dtype])
    return values, indices, counts
