"""Taylor pruning: the change of the loss that a weight's removal would make, to first order.

Paper: Molchanov et al. 2019, https://arxiv.org/abs/1906.10771, Eq. 8: ``(g_m w_m)^2``, averaged over mini-batches. The
paper sums it over filters or gates and prunes during training; here it ranks single weights, once.
"""

from typing import ClassVar

from torch import Tensor

from ..checks import check_floating, check_shape
from .pruner import Layer, Pruner


class Taylor(Pruner):
    """Options of ``taylor``: all weights of a layer compete; needs the gradient of a loss.

    The loss is that of predicting the next token, or for batches ``(inputs, labels)`` the cross-entropy of the labels.
    """

    needs_gradients: ClassVar[bool] = True

    def score(self, layer: Layer) -> Tensor:
        """See `taylor_score`."""
        assert layer.gradient is not None  # gathered, as asked for
        return taylor_score(layer.weight, layer.gradient)


def taylor_score(weight: Tensor, squared_gradient: Tensor) -> Tensor:
    """Importance ``w^2 * mean(g^2)``; higher is kept.

    Args:
        weight: any shape, any float dtype.
        squared_gradient: of the same shape, the mean over batches of the squared gradient of the loss.

    Returns:
        float32 of the same shape, detached.

    Raises:
        InputError: if a shape or a type does not match.
    """
    check_floating("taylor_score", "weight", weight)
    check_shape("taylor_score", "squared_gradient", squared_gradient, *weight.shape)
    return weight.detach().float().square() * squared_gradient.detach().float()
