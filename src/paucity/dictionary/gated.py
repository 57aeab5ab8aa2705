"""Gated: one affine map decides which atoms are used, a tied one how much of them, so that l1 does not shrink codes.

Paper: Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014, Eq. 6-8: with ``u = W_enc (x - b_dec)``,
``gate = u + b_gate``, ``z = [gate > 0] * relu(exp(r) * u + b_mag)`` and the loss
``|x - x_hat(z)|^2 + l1 * sum(relu(gate)) + |x - x_frozen(relu(gate))|^2``, where the decoder of the last term is taken
as a constant. ``b_gate`` is the encoder's bias.

Not implemented: resampling of silent atoms; AuxK of `SparseAutoencoder` trains their gates instead (``auxiliary=0``
leaves it out).
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_range
from ..kernels.codes import decode_codes, encode_kept
from ..ops.formats import Codes
from .base import Batch
from .rules import above, warmed
from .sae import Draft, Rule, SparseAutoencoder


class Gated(Rule):
    """Keep where the gate is open.

    Args:
        l1: weight of the sum of the open gates, against the squared error summed over the width.
        warmup: share of the steps over which the weight rises from 0.

    Attributes:
        log_gain: ``[dict_size]``, the paper's ``r_mag``.
        magnitude_bias: ``[dict_size]``, its ``b_mag``.
    """

    log_gain: nn.Parameter
    magnitude_bias: nn.Parameter

    def __init__(self, l1: float = 5.0, *, warmup: float = 0.05) -> None:
        super().__init__()
        check_range("Gated", "l1", l1, 0)
        check_range("Gated", "warmup", warmup, 0, 1)
        self.l1, self.warmup = l1, warmup

    def attach(self, sae: SparseAutoencoder) -> None:
        """See `Rule.attach`."""
        self.log_gain = nn.Parameter(torch.zeros(sae.dict_size))
        self.magnitude_bias = nn.Parameter(torch.zeros(sae.dict_size))

    def encode(self, sae: SparseAutoencoder, x: Tensor) -> Codes:
        """See `Rule.encode`."""
        return self._both(sae, x)[0]

    def train_codes(self, sae: SparseAutoencoder, batch: Batch) -> Draft:
        """See `Rule.train_codes`."""
        codes, gate = self._both(sae, batch.x)
        frozen = decode_codes(gate, codes.indices, sae.decoder.detach()) + sae.decoder_bias.detach()
        weight = self.l1 * warmed(batch, self.warmup)
        return Draft(
            codes,
            {"l1": weight * gate.sum(-1).mean(), "gate": (frozen - batch.target).square().sum(-1).mean()},
        )

    def _both(self, sae: SparseAutoencoder, x: Tensor) -> tuple[Codes, Tensor]:
        """The codes, and the open gates ``[n, w]`` in the same slots."""
        indices, used = above(sae.pre(x))
        # Without the bias: the magnitudes must not send a gradient to it.
        product, at = encode_kept(sae.centred(x), sae.encoder, None, indices), indices.long()
        gate = torch.where(used, product + sae.encoder_bias[at], 0).relu()
        magnitude = (product * self.log_gain.exp()[at] + self.magnitude_bias[at]).relu()
        return Codes(torch.where(used, magnitude, 0), indices, sae.dict_size), gate

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """See `Rule.rescale`."""
        self.magnitude_bias.mul_(factor)

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`."""
        return {"l1": self.l1, "warmup": self.warmup}
