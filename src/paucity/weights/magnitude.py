"""Magnitude pruning: the smallest weights go.

Paper: Han et al. 2015, https://arxiv.org/abs/1506.02626, section 3; one-shot as the baseline of Wanda,
https://arxiv.org/abs/2306.11695, compared within a whole layer. Retraining between steps is
`paucity.weights.iterative`.
"""

from torch import Tensor

from ..checks import check_floating, check_ndim
from ..ops.select import global_topk_mask
from .pruner import Layer, Pruner


class Magnitude(Pruner):
    """Options of ``magnitude``: all weights of a layer compete."""

    def score(self, layer: Layer) -> Tensor:
        """See `magnitude_score`."""
        return magnitude_score(layer.weight)


def magnitude_score(weight: Tensor) -> Tensor:
    """Importance ``|W_ij|``; higher is kept.

    Args:
        weight: any shape, any float dtype.

    Returns:
        float32 of the same shape, detached.

    Raises:
        InputError: if ``weight`` is not a floating-point tensor.
    """
    check_floating("magnitude_score", "weight", weight)
    return weight.detach().float().abs()


def magnitude_mask(weight: Tensor, *, sparsity: float) -> Tensor:
    """Keep-mask ``[out, in]`` (bool); all entries of the layer compete."""
    check_ndim("magnitude_mask", "weight", weight, 2)
    return global_topk_mask(magnitude_score(weight), sparsity=sparsity)
