"""What the sweep computes, column by column."""

import torch
from torch import Tensor

from ...ops.select import nm_mask


def sweep(weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[cols, rows], [cols, cols], [cols, rows]`` or None ``-> weight, mask, errors``; m is 0 without groups."""
    weight, errors, diagonal = weight.clone(), torch.empty_like(weight), factor.diagonal()
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.clone()
    for i in range(len(weight)):
        if m and i % m == 0:
            group = slice(i, i + m)
            score = (weight[group] / diagonal[group, None]).square().masked_fill(~kept[group], -1)
            kept[group] &= nm_mask(score, n=n, m=m, dim=0)
        errors[i] = torch.where(kept[i], 0, weight[i]) / diagonal[i]
        weight[i] = torch.where(kept[i], weight[i], 0)
        weight[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return weight, kept, errors
