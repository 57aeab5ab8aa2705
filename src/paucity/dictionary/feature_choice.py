"""Feature choice: each feature takes the tokens of a batch on which it is highest, as many as its rank allows.

Paper: Ayonrinde 2024, https://arxiv.org/abs/2411.02124: the entries ``k * batch`` are shared out over features, ``m_i``
to feature i, equally or by a Zipf law over their ranks; feature i is kept on its top ``m_i`` tokens. No feature goes
without tokens, and a token has as many features as choose it. With aux_zipf_loss (see `paucity.dictionary.usage`).
Which feature has which rank, the exponent, and how a row is encoded for itself are not known to us, and no code is
public. Here ranks are those of the running count of entries that a feature would get if the batch were free (Mutual
choice), and after training a feature fires above its own threshold, the running mean of what lies halfway between the
lowest value that it took and the highest that it left: above the lowest alone it would fire half a time less a batch.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_int, check_range
from ..kernels.select import topk
from ..ops.formats import Codes
from .base import Batch
from .batch_topk import batch_topk
from .rules import above
from .sae import Draft, Rule, SparseAutoencoder
from .usage import Usage


def feature_shares(total: int, dict_size: int, most: int, exponent: float) -> Tensor:
    """How many of ``total`` entries each rank gets: in proportion to ``rank ** -exponent``, 1 to ``most`` each.

    What a rank cannot hold goes to the others in proportion. Every rank gets one entry, also where there are fewer.

    Returns:
        ``[dict_size]`` int64, descending but for rounding, whose sum is ``total`` within those bounds.
    """
    check_int("feature_shares", "most", most)
    check_range("feature_shares", "exponent", exponent, 0)
    weight = torch.arange(1, dict_size + 1, dtype=torch.float64) ** -exponent
    total = min(max(total, dict_size), dict_size * most)
    low, high = 0.0, most / float(weight[-1])
    for _ in range(100):  # the scale at which the clamped shares sum to the total
        scale = (low + high) / 2
        low, high = (scale, high) if float((scale * weight).clamp(1, most).sum()) < total else (low, scale)
    ends = ((high * weight).clamp(1, most).cumsum(0) + 0.5).floor().long()
    ends[-1] = total
    return ends.diff(prepend=ends.new_zeros(1)).clamp(1, most)


class FeatureChoice(Rule):
    """Keep ``k`` a row on average: each atom its best rows of a batch, and what is above its threshold afterwards.

    Args:
        k: mean entries of a code, at most the atoms that there are.
        exponent: of the Zipf law by which ranks share the entries; 0 gives all the same.
        margin: see `MutualChoice`.
        rate: see `MutualChoice`.
    """

    threshold: Tensor
    wanted: Tensor

    def __init__(self, k: int = 32, *, exponent: float = 0.7, margin: float = 0.5, rate: float = 0.01) -> None:
        super().__init__()
        check_int("FeatureChoice", "k", k)
        check_range("FeatureChoice", "exponent", exponent, 0)
        self.k, self.exponent, self.usage = k, exponent, Usage(margin, rate)

    def attach(self, sae: SparseAutoencoder) -> None:
        """Raise InputError if there are fewer atoms than ``k``."""
        check_int("FeatureChoice", "k", self.k, 1, sae.dict_size)
        self.usage.attach(sae.dict_size)
        self.register_buffer("threshold", torch.zeros(sae.dict_size))
        self.register_buffer("wanted", torch.zeros(sae.dict_size))

    def encode(self, sae: SparseAutoencoder, x: Tensor) -> Codes:
        """See `Rule.encode`; what is above each atom's threshold, 0 before training."""
        return _codes(sae, x, sae.pre(x) - self.threshold)

    def train_codes(self, sae: SparseAutoencoder, batch: Batch) -> Draft:
        """See `Rule.train_codes`."""
        codes = _codes(sae, batch.x, self._choose(sae.pre(batch.x)))
        self.usage.observe(codes)
        return Draft(codes)

    @torch.no_grad()
    def _choose(self, pre: Tensor) -> Tensor:
        n, dict_size = pre.shape
        free, used = batch_topk(pre, self.k)
        wanted = torch.bincount(free[used], minlength=dict_size).to(self.wanted.dtype)
        self.wanted.lerp_(wanted, self.usage.weight)
        shares = torch.empty(dict_size, dtype=torch.int64, device=pre.device)
        ranks = self.wanted.argsort(descending=True, stable=True)
        shares[ranks] = feature_shares(self.k * n, dict_size, n, self.exponent).to(pre.device)
        mask, ends = torch.zeros_like(pre.mT), self.threshold.clone()
        octaves = shares.log2().floor()
        for octave in sorted(set(octaves.tolist())):  # atoms of about the same share are ranked together
            atoms = (octaves == octave).nonzero().squeeze(-1)
            values, rows = topk(pre[:, atoms].mT.contiguous(), min(n, int(shares[atoms].max()) + 1))
            kept = (torch.arange(values.shape[1], device=pre.device) < shares[atoms, None]) & (values > 0)
            mask[atoms] = torch.zeros_like(mask[atoms]).scatter_(1, rows.long(), kept.to(mask.dtype))
            lowest = values.where(kept, torch.inf).min(1).values
            next_one = values.masked_fill(kept, 0).clamp_min(0).max(1).values
            ends[atoms] = ((lowest + next_one) / 2).where(kept.any(1), ends[atoms])
        self.threshold.lerp_(ends, self.usage.weight)
        return mask.mT.contiguous()

    def neglected(self, sae: SparseAutoencoder, batch: Batch) -> Tensor:
        """See `Rule.neglected`; aux_zipf_loss."""
        return self.usage.neglected(super().neglected(sae, batch), sae.k_aux)

    def rescale(self, factor: float) -> None:
        """See `Rule.rescale`."""
        self.threshold *= factor

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`."""
        return {"k": self.k, "exponent": self.exponent, "margin": self.usage.margin, "rate": self.usage.rate}


def _codes(sae: SparseAutoencoder, x: Tensor, score: Tensor) -> Codes:
    """Rectified pre-activations where the score is positive."""
    indices, used = above(score)
    return Codes(torch.where(used, sae.kept(x, indices), 0).relu(), indices, sae.dict_size)
