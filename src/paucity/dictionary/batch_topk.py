"""BatchTopK: ``k`` entries a row on average, shared out over a batch by the pre-activations.

Paper: Bussmann et al. 2024, https://arxiv.org/abs/2412.06410, Eq. 5-7. In training the ``k * n`` highest positive
pre-activations of a batch of ``n`` rows stay. A row must not depend on others when it is used: then what is above one
threshold stays, the mean over batches of training of the lowest entry that stayed.

The paper does not say how that mean is taken; here it is a plain mean first and then one that forgets, so that batches
before the encoder settled do not count.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_int, check_range
from ..kernels.select import topk
from ..ops.formats import Codes
from ..ops.select import global_topk_mask
from .base import Batch
from .rules import above
from .sae import Draft, Rule, SparseAutoencoder


class BatchTopK(Rule):
    """Keep ``k`` a row on average of a batch; outside training, what is above a threshold.

    Args:
        k: entries of a code on average, at most the atoms that there are.
        forget: share of the threshold that each batch of training replaces, once there were many.

    Attributes:
        threshold: scalar, 0 before training.
    """

    threshold: Tensor

    def __init__(self, k: int = 32, *, forget: float = 0.01) -> None:
        super().__init__()
        check_int("BatchTopK", "k", k)
        check_range("BatchTopK", "forget", forget, 0, 1, open_low=True)
        self.k, self.forget = k, forget
        self.register_buffer("threshold", torch.zeros(()))

    def attach(self, sae: SparseAutoencoder) -> None:
        """Raise InputError if there are fewer atoms than ``k``."""
        check_int("BatchTopK", "k", self.k, 1, sae.dict_size)

    def encode(self, sae: SparseAutoencoder, x: Tensor) -> Codes:
        """See `Rule.encode`."""
        indices, used = above(sae.pre(x), self.threshold.clamp_min(0))
        return Codes(torch.where(used, sae.kept(x, indices), 0).relu(), indices, sae.dict_size)

    def train_codes(self, sae: SparseAutoencoder, batch: Batch) -> Draft:
        """See `Rule.train_codes`."""
        indices, used = batch_topk(sae.pre(batch.x), self.k)
        values = torch.where(used, sae.kept(batch.x, indices), 0).relu()
        with torch.no_grad():
            lowest = values.masked_fill(values == 0, torch.inf).amin()
            if bool(lowest.isfinite()):
                self.threshold.lerp_(lowest.to(self.threshold.dtype), max(self.forget, 1 / (batch.step + 1)))
        return Draft(Codes(values, indices, sae.dict_size))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """See `Rule.rescale`."""
        self.threshold *= factor

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`."""
        return {"k": self.k, "forget": self.forget}


def batch_topk(score: Tensor, k: int, *, by_abs: bool = False) -> tuple[Tensor, Tensor]:
    """The ``k * n`` highest entries of ``n`` rows together, of equal ones the first; no gradient flows.

    A row's best few are compared with all others' best few, and once more with twice as many where all of a row stayed:
    no sort of all ``n * dict_size`` entries is done.

    Args:
        score: ``[n, dict_size]``, any float dtype.
        k: entries a row on average.
        by_abs: rank by absolute value.

    Returns:
        indices ``[n, w]`` (int32) and used ``[n, w]`` (bool), best first in a row; ``w`` is the most that a row has, at
        least 1.
    """
    score, wide = score.detach(), min(score.shape[1], 2 * k)
    while True:
        best, indices = topk(score, wide, by_abs=by_abs)
        used = global_topk_mask(best, k=k * len(score), by_abs=by_abs)
        if wide == score.shape[1] or not bool(used[:, -1].any()):
            break
        wide = min(score.shape[1], 2 * wide)
    most = max(1, int(used.sum(-1).max())) if len(used) else 1
    return indices[:, :most], used[:, :most]
