"""Wanda: weight magnitude times input activation norm, no retraining.

Paper: Sun et al. 2023, https://arxiv.org/abs/2306.11695, Eq. 1 and Algorithm 1. Not implemented: the variant of the
official code that searches a threshold on the cumulative score instead of taking the top-k of a row.
"""

from typing import ClassVar

from torch import Tensor

from ..checks import check_floating, check_ndim, check_shape
from ..ops.select import topk_mask
from .pruner import Layer, Pruner, Scope
from .statistics import InputNorm


class Wanda(Pruner):
    """Options of ``wanda``: the weights of an output row compete."""

    gathers: ClassVar[type[InputNorm] | None] = InputNorm
    scope: Scope = "row"

    def score(self, layer: Layer) -> Tensor:
        """See `wanda_score`."""
        assert layer.inputs is not None  # gathered, as asked for
        return wanda_score(layer.weight, layer.inputs.norm.to(layer.weight.device))


def wanda_score(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Importance ``|W_ij| * ||x_j||_2``; higher is kept.

    Args:
        weight: ``[out, in]``, or ``[E, out, in]`` for a stack of experts; any float dtype.
        input_norm: ``[in]`` or ``[E, in]``, L2 norm of each input feature over the calibration tokens.

    Returns:
        float32 of the shape of ``weight``, detached.

    Raises:
        InputError: if a shape or a type does not match.
    """
    check_ndim("wanda_score", "weight", weight, 2, 3)
    check_floating("wanda_score", "weight", weight)
    check_shape("wanda_score", "input_norm", input_norm, *weight.shape[:-2], weight.shape[-1])
    return weight.detach().float().abs() * input_norm.detach().float().unsqueeze(-2)


def wanda_mask(weight: Tensor, input_norm: Tensor, *, sparsity: float) -> Tensor:
    """Keep-mask of the shape of ``weight`` (bool); scores compete within an output row."""
    return topk_mask(wanda_score(weight, input_norm), sparsity=sparsity, dim=-1)
