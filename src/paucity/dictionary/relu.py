"""ReLU with an l1 penalty: the autoencoder of Bricken et al. 2023 and Cunningham et al. 2023.

Paper: Cunningham et al. 2023, https://arxiv.org/abs/2309.08600, Eq. 1-4: ``z = relu(W_enc (x - b_dec) + b_enc)`` and
the loss ``|x - x_hat|^2 + l1 * sum_i z_i |d_i|``. Weighting by the norm of an atom (Conerly et al. 2024, "Update on how
we train SAEs") is to keep long atoms from evading the penalty; atoms here have norm 1, so the weight is 1.

Not implemented: ghost gradients and resampling. AuxK of `SparseAutoencoder` reaches silent atoms only where their
pre-activation is positive somewhere, which a silent atom of this rule is not; ``auxiliary=0`` leaves it out.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_range
from ..ops.formats import Codes
from .base import Batch
from .rules import above, warmed
from .sae import Draft, Rule, SparseAutoencoder


class ReLU(Rule):
    """Keep what is positive.

    Args:
        l1: weight of the sum of a code, against the squared error summed over the width.
        warmup: share of the steps over which the weight rises from 0.
    """

    def __init__(self, l1: float = 5.0, *, warmup: float = 0.05) -> None:
        super().__init__()
        check_range("ReLU", "l1", l1, 0)
        check_range("ReLU", "warmup", warmup, 0, 1)
        self.l1, self.warmup = l1, warmup

    def encode(self, sae: SparseAutoencoder, x: Tensor) -> Codes:
        """See `Rule.encode`."""
        indices, used = above(sae.pre(x))
        return Codes(torch.where(used, sae.kept(x, indices), 0).relu(), indices, sae.dict_size)

    def train_codes(self, sae: SparseAutoencoder, batch: Batch) -> Draft:
        """See `Rule.train_codes`."""
        codes = self.encode(sae, batch.x)
        weight = self.l1 * warmed(batch, self.warmup)
        return Draft(codes, {"l1": weight * codes.values.sum(-1).mean()})

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`."""
        return {"l1": self.l1, "warmup": self.warmup}
