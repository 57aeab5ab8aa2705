"""JumpReLU: each atom has a threshold of its own, learned together with the number of entries that a code has.

Paper: Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435, Eq. 8-12: ``z = u * [u > theta]`` and the loss
``|x - x_hat|^2 + l0 * sum_i [u_i > theta_i]``. Neither has a gradient to the threshold; the pseudo-derivatives are
``-theta / eps * K((u - theta) / eps)`` of the code and ``-1 / eps * K(...)`` of the count, with ``K`` 1 within 1/2 of 0
and 0 elsewhere. The count sends no gradient to ``u``.

Differs from the paper: the threshold itself is trained and kept at 0 or above, where the paper trains its logarithm,
which Adam moves by a share of the threshold a step. The paper scales activations to norm 1 and takes 0.001 for both the
first threshold and ``eps``; the trainer scales them to ``sqrt(input_size)``, where that is about 0.03 at width 768.
The paper's encoder does not subtract the offset (``SparseAutoencoder(..., centre=False)``).
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_range
from ..ops.formats import Codes
from .base import Batch
from .rules import above, warmed
from .sae import Draft, Rule, SparseAutoencoder


class JumpReLU(Rule):
    """Keep what is above a threshold that is learned.

    Args:
        l0: weight of the number of entries of a code, against the squared error summed over the width.
        initial: threshold of every atom before training.
        bandwidth: ``eps``, how near to its threshold a pre-activation moves it.
        warmup: share of the steps over which the weight rises from 0.

    Attributes:
        threshold: ``[dict_size]``.
    """

    threshold: nn.Parameter

    def __init__(self, l0: float = 1.0, *, initial: float = 0.03, bandwidth: float = 0.03, warmup: float = 0.1) -> None:
        super().__init__()
        check_range("JumpReLU", "l0", l0, 0)
        check_range("JumpReLU", "initial", initial, 0)
        check_range("JumpReLU", "bandwidth", bandwidth, 0, open_low=True)
        check_range("JumpReLU", "warmup", warmup, 0, 1)
        self.l0, self.initial, self.bandwidth, self.warmup = l0, initial, bandwidth, warmup

    def attach(self, sae: SparseAutoencoder) -> None:
        """See `Rule.attach`."""
        self.threshold = nn.Parameter(torch.full((sae.dict_size,), float(self.initial)))

    def encode(self, sae: SparseAutoencoder, x: Tensor) -> Codes:
        """See `Rule.encode`."""
        indices, used = above(sae.pre(x).sub_(self.threshold.detach().clamp_min(0)))
        return Codes(torch.where(used, sae.kept(x, indices), 0), indices, sae.dict_size)

    def train_codes(self, sae: SparseAutoencoder, batch: Batch) -> Draft:
        """See `Rule.train_codes`; slots whose entry is just below its threshold hold 0 and move the threshold."""
        indices, used = above(sae.pre(batch.x).sub_(self.threshold.detach()), -self.bandwidth / 2)
        kept = torch.where(used, sae.kept(batch.x, indices), -torch.inf)
        threshold = self.threshold[indices.long()]
        values, open_ = _Jump.apply(kept, threshold, self.bandwidth)  # type: ignore[no-untyped-call]
        weight = self.l0 * warmed(batch, self.warmup)
        return Draft(Codes(values, indices, sae.dict_size), {"l0": weight * open_.sum(-1).mean()})

    @torch.no_grad()
    def after_step(self) -> None:
        """Thresholds of at least 0."""
        self.threshold.clamp_(min=0)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """See `Rule.rescale`."""
        self.threshold.mul_(factor)

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`."""
        return {"l0": self.l0, "initial": self.initial, "bandwidth": self.bandwidth, "warmup": self.warmup}


class _Jump(torch.autograd.Function):
    """``u * [u > theta]`` and ``[u > theta]``, with the paper's pseudo-derivatives."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        above = kept > threshold
        near = ((kept - threshold) / bandwidth).abs() < 0.5
        ctx.save_for_backward(above, near, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(above, kept, 0), above.to(kept.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        above, near, threshold = ctx.saved_tensors
        to_values, to_open = grads
        to_threshold = torch.where(near, -(threshold * to_values + to_open) / ctx.bandwidth, 0)
        return torch.where(above, to_values, 0), to_threshold, None
