"""top-AFA: as many of the highest entries as bring the norm of the code closest to that of the activation.

Paper: Lee et al. 2025, https://arxiv.org/abs/2503.24277: atoms of norm 1, nearly orthogonal, make ``|z|`` close to
``|x - b|`` (approximate feature activation), so each row keeps its highest ``k = argmin_j | sqrt(sum of the j highest
(z |d|)^2) - |x - b| |`` and there is no k to set; the loss gets ``weight * mean((|z| - |x|)^2)``, weight 1/128 to 1/16.
As in the authors' code the error is per dimension, so beside ours, which is summed over the width, this is too. Other
than there the encoder has a bias and starts at norm 1 (there at ``sqrt(2 width / atoms)``), rows are not standardised
one by one, ``b`` starts at the mean and not at 0, and the loss matches the norm that the selection does, ``|x - b|``,
without gradient to ``b``. With all of that as it is there, we saw fewer entries and a much larger error.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_range
from ..ops.formats import Codes
from .base import Batch
from .sae import Draft, Rule, SparseAutoencoder


class TopAFA(Rule):
    """Keep of each row what its norm needs.

    Args:
        weight: of the loss that matches norms; 0 matches none.
    """

    def __init__(self, weight: float = 1 / 32) -> None:
        super().__init__()
        check_range("TopAFA", "weight", weight, 0)
        self.weight = weight

    def encode(self, sae: SparseAutoencoder, x: Tensor) -> Codes:
        """See `Rule.encode`."""
        with torch.no_grad():
            size = sae.pre(x).relu_() * sae.decoder.norm(dim=1)
            size, order = size.sort(dim=1, descending=True, stable=True)
            gap = (size.square().cumsum(1).sqrt() - sae.centred(x).norm(dim=1, keepdim=True)).abs_()
            counts = gap.argmin(1) + 1
            capacity = int(counts.max()) if len(counts) else 1
            used = torch.arange(capacity, device=x.device) < counts[:, None]
            indices = order[:, :capacity].where(used, 0)
        return Codes(sae.kept(x, indices).relu() * used, indices, sae.dict_size)

    def train_codes(self, sae: SparseAutoencoder, batch: Batch) -> Draft:
        """See `Rule.train_codes`."""
        codes = self.encode(sae, batch.x)
        if not self.weight:
            return Draft(codes)
        norm = codes.values.square().sum(1).clamp_min(torch.finfo(codes.values.dtype).tiny).sqrt()
        gap = norm - sae.centred(batch.x).detach().norm(dim=1)
        return Draft(codes, {"norm": self.weight * sae.output_size * gap.square().mean()})

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`."""
        return {"weight": self.weight}
