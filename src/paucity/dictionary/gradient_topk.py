"""Gradient SAE: k entries of each row, ranked by their height and by what they do to a model's loss.

Paper: Olmo et al. 2024, https://arxiv.org/abs/2411.10397: TopK ranks by ``z + beta z * |W_dec (dL/dx)|``, ``z`` the
rectified pre-activations and ``L`` the loss of the model at the token whose activation ``x`` is, and keeps the values
of ``z``. No code of the authors was found. Here the influence ``|W_dec (dL/dx)|`` is measured in its running mean over
training, so that ``beta`` has no unit and does not depend on how the loss is summed; which ``beta`` the paper takes is
not known to us. The gradient serves training; `encode`, which has none, is TopK, and `codes_with_gradient` ranks as
training does.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_int, check_range, check_shape, fail
from ..kernels.select import topk
from ..ops.formats import Codes
from .base import Batch
from .sae import Draft, Rule, SparseAutoencoder


class GradientTopK(Rule):
    """Keep ``k`` of each row; in training those that also move a model's loss.

    Args:
        k: entries of a code, at most the atoms that there are.
        beta: weight of the influence; 0 is TopK.
        rate: weight of a new batch in the running mean of the influence.
    """

    needs_gradient = True
    unit: Tensor

    def __init__(self, k: int = 32, *, beta: float = 1.0, rate: float = 0.01) -> None:
        super().__init__()
        check_int("GradientTopK", "k", k)
        check_range("GradientTopK", "beta", beta, 0)
        check_range("GradientTopK", "rate", rate, 0, 1)
        self.k, self.beta, self.rate = k, beta, rate
        self.register_buffer("unit", torch.zeros(()))

    def attach(self, sae: SparseAutoencoder) -> None:
        """Raise InputError if there are fewer atoms than ``k``, or what is decoded is not what is encoded."""
        check_int("GradientTopK", "k", self.k, 1, sae.dict_size)
        if sae.output_size != sae.input_size:
            raise fail("GradientTopK", "output_size", f"be the input_size, {sae.input_size}", sae.output_size)

    def encode(self, sae: SparseAutoencoder, x: Tensor) -> Codes:
        """See `Rule.encode`; without a gradient."""
        _, indices = topk(sae.pre(x), self.k)
        return Codes(sae.kept(x, indices).relu(), indices, sae.dict_size)

    def codes_with_gradient(self, sae: SparseAutoencoder, x: Tensor, gradient: Tensor) -> Codes:
        """Codes of ``x [n, input_size]`` where the gradient of the loss to it, of the same shape, ranks too."""
        check_shape("GradientTopK", "gradient", gradient, *x.shape)
        return self._codes(sae, x, influence(sae, gradient))

    def train_codes(self, sae: SparseAutoencoder, batch: Batch) -> Draft:
        """See `Rule.train_codes`.

        Raises:
            InputError: if the batch has no gradient.
        """
        if batch.gradient is None:
            raise fail("GradientTopK", "gradient", "be in the batch", None)
        found = influence(sae, batch.gradient)
        self.unit.lerp_(found.mean().to(self.unit.dtype), max(self.rate, 1 / (batch.step + 1)))
        return Draft(self._codes(sae, batch.x, found))

    @torch.no_grad()
    def _indices(self, sae: SparseAutoencoder, x: Tensor, found: Tensor) -> Tensor:
        unit = self.unit if float(self.unit) > 0 else found.mean()
        weight = 1 + self.beta * found / unit.clamp_min(torch.finfo(found.dtype).tiny)
        return topk(sae.pre(x).relu_() * weight, self.k)[1]

    def _codes(self, sae: SparseAutoencoder, x: Tensor, found: Tensor) -> Codes:
        indices = self._indices(sae, x, found)
        return Codes(sae.kept(x, indices).relu(), indices, sae.dict_size)

    def rescale(self, factor: float) -> None:
        """See `Rule.rescale`; gradients shrink as activations grow."""
        self.unit /= factor

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`."""
        return {"k": self.k, "beta": self.beta, "rate": self.rate}


@torch.no_grad()
def influence(sae: SparseAutoencoder, gradient: Tensor) -> Tensor:
    """``|W_dec gradient|``, ``[n, dict_size]``: by how much the loss changes with a little of each atom."""
    return (gradient.to(sae.decoder.dtype) @ sae.decoder.mT).abs_()
