"""What rules share: the entries above a threshold as (indices, used), and penalties that warm up."""

import torch
from torch import Tensor

from ..kernels.select import threshold_select
from .base import Batch

_GUESS = 256


def above(score: Tensor, threshold: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """The entries of each row above a threshold, however many they are.

    Args:
        score: ``[n, dict_size]``, any float dtype.
        threshold: a number, or a tensor that broadcasts to ``[n, 1]``.

    Returns:
        indices ``[n, w]`` (int32, ascending in what is used) and used ``[n, w]`` (bool), where ``w`` is the most that a
        row has, at least 1; slots that are not used name different atoms, so that none is named by all rows.
    """
    capacity = min(score.shape[1], _GUESS)
    _, indices, counts = threshold_select(score, threshold, capacity=capacity)
    most = int(counts.max()) if counts.numel() else 0
    if most > capacity:
        _, indices, counts = threshold_select(score, threshold, capacity=most)
    slots = torch.arange(max(1, most), dtype=torch.int32, device=score.device)
    used = slots < counts.unsqueeze(-1)
    return torch.where(used, indices[:, : len(slots)], slots), used


def warmed(batch: Batch, share: float) -> float:
    """Factor of a penalty: up in a straight line over the first ``share`` of the steps, then 1."""
    return min(1.0, (batch.step + 1) / max(1, round(batch.total * share)))
