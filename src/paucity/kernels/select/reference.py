"""What the selection operators compute, by sorting; the order is that of `paucity.ops.select`.

Rows are ``[rows, n]``; indices and counts are int32.
"""

import torch
from torch import Tensor

from ...ops import select


def topk(x: Tensor, k: int, by_abs: bool) -> tuple[Tensor, Tensor]:
    """Values and indices ``[rows, k]`` of the ``k`` best entries of each row, best first."""
    indices = select.topk_indices(x, k, by_abs=by_abs)
    return x.gather(-1, indices), indices.to(torch.int32)


def topk_mask(x: Tensor, k: int, by_abs: bool) -> Tensor:
    """Mask ``[rows, n]`` (bool) of the ``k`` best entries of each row."""
    return select.topk_mask(x, k=k, by_abs=by_abs)


def threshold_select(x: Tensor, threshold: Tensor, capacity: int, by_abs: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``capacity`` entries above ``threshold`` ``[rows]`` (float32, or float64 for float64) of each row.

    Returns values ``[rows, capacity]``, indices (unused slots: 0 and -1), and how many there are, ``[rows]``.
    """
    kept = (x.abs() if by_abs else x) > threshold.unsqueeze(-1)
    counts = kept.sum(-1, dtype=torch.int32)
    order = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :capacity]
    used = torch.arange(capacity, device=x.device) < counts.unsqueeze(-1)
    values = torch.where(used, x.gather(-1, order), 0)
    return values, torch.where(used, order, -1).to(torch.int32), counts


def statistical_topk(x: Tensor, k: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """`threshold_select` above the `statistical_threshold` of each row for ``k`` of its entries."""
    wide = torch.promote_types(x.dtype, torch.float32)
    threshold = select.statistical_threshold(x, sparsity=1 - k / x.shape[-1]) if x.numel() else x.new_zeros(len(x), 1)
    return threshold_select(x, threshold.squeeze(-1).to(wide), capacity, False)
