"""CFSP: blocks by how far they turn the hidden states, neurons by their activations, both from one forward pass.

Paper: Wang et al. 2024, https://arxiv.org/abs/2409.13199; details from the authors' code.

1. Coarse: the importance of a block is the angular distance of what goes in and what comes out; its share of the
   neurons is `paucity.ops.budget_blocks.by_importance`, counts rounded to multiples (128 in the paper), of their sum.
2. Fine: within a block, `cfsp_score` of every neuron.
3. Recovery: low-rank adapters whose ranks follow the importance (`structured.recover`).

The authors divide each matrix by its sums over the very dimension over which they average afterwards, so that all three
terms come to a constant and their fine score ranks neurons by the norm of their activations alone. That is
``relative="column"`` here. With ``relative="row"`` a weight counts in relation to the other weights of its output (of
down) or its input (of gate and up), so that the weights have a say. Pruned are feed-forward neurons only, as in the
paper; attention stays.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ...checks import check_choice, check_ndim, check_range, check_shape

Relative = Literal["row", "column"]
TOKENS_OF_CODE = 128 * 1024
"""Tokens over which the authors sum the angular distance, before they divide by `SCALE_OF_CODE`."""
SCALE_OF_CODE = 1e4


def coarse_importance(angular: Sequence[float]) -> list[float]:
    """Mean angular distances (`Statistics.angular`) in the unit of the authors, in which their sharpness is 1."""
    return [value * TOKENS_OF_CODE / SCALE_OF_CODE for value in angular]


def cfsp_score(
    down: Tensor,
    ins: Sequence[Tensor],
    norm: Tensor,
    *,
    weight_power: float = 1.0,
    power: float = 1.0,
    relative: Relative = "column",
) -> Tensor:
    """Importance of neurons: the mean over rows of relative weights, times the norm of the activation.

    ``mean_i(|D_ij| n_j^b / sum) n_j^c`` plus the same for each of ``ins`` without the first ``n``, where the sum is
    over the neurons j of a row (``row``) or over the rows i of a neuron (``column``, the authors' code).

    Args:
        down: ``[hidden, neurons]``.
        ins: gate and up, or up alone, each ``[neurons, hidden]``.
        norm: ``[neurons]``, L2 norm of each activation over the calibration tokens.
        weight_power: b, at least 0.
        power: c, at least 0.
        relative: what a weight is divided by.

    Returns:
        float32 ``[neurons]``; higher is kept.

    Raises:
        InputError: if shapes do not match or a number is out of range.
    """
    check_ndim("cfsp_score", "down", down, 2)
    check_shape("cfsp_score", "norm", norm, down.shape[1])
    check_range("cfsp_score", "weight_power", weight_power, 0)
    check_range("cfsp_score", "power", power, 0)
    check_choice("cfsp_score", "relative", relative, ("row", "column"))
    norm = norm.detach().float()
    terms = [down.detach().float().abs() * norm.pow(weight_power)]
    for index, weight in enumerate(ins):
        check_shape("cfsp_score", f"ins[{index}]", weight, down.shape[1], None)
        terms.append(weight.detach().float().abs().T)
    dim = 1 if relative == "row" else 0
    parts = [(term / term.sum(dim, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).mean(0) for term in terms]
    return torch.stack(parts).sum(0) * norm.pow(power)


def largest_remainder(fair: Sequence[float]) -> list[int]:
    """Whole numbers, at least 1 each, of the same sum (rounded, and as far as there are), ties to the earlier.

    Examples:
        >>> largest_remainder([2.5, 1.3, 0.2])
        [2, 1, 1]
    """
    total, result = max(len(fair), round(sum(fair))), [max(1, math.floor(value)) for value in fair]
    while sum(result) < total:
        result[max(range(len(fair)), key=lambda i: fair[i] - result[i])] += 1
    while sum(result) > total:
        result[max((i for i in range(len(fair)) if result[i] > 1), key=lambda i: result[i] - fair[i])] -= 1
    return result
