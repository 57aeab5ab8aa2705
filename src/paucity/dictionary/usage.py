"""How often atoms are used, held against Zipf's law: what aux_zipf_loss trains besides the dead.

Paper: Ayonrinde 2024, https://arxiv.org/abs/2411.02124. AuxK (Gao et al. 2024) gives what is left of the reconstruction
to atoms that are dead; aux_zipf_loss gives it to all that are used less than expected, since the densities of atoms,
ranked, follow a Zipf curve. No code is public and the paper's constants are not known to us: that the curve is fit by
least squares on the logarithms with weight ``1 / rank`` (so that every octave of ranks counts alike), that an atom
counts as under-used below a share of the curve, and that the dead come first, is ours.
"""

import torch
from torch import Tensor, nn

from ..checks import check_floating, check_ndim, check_range
from ..ops.formats import Codes


def zipf_fit(density: Tensor) -> tuple[float, float]:
    """``(scale, exponent)`` of ``density = scale * rank ** -exponent``, rank 1 the highest; atoms without use are out.

    Args:
        density: ``[dict_size]``, any float dtype, not negative.
    """
    check_ndim("zipf_fit", "density", density, 1)
    check_floating("zipf_fit", "density", density)
    used = density[density > 0].double().sort(descending=True).values
    if len(used) < 2:
        return (float(used[0]), 0.0) if len(used) else (0.0, 0.0)
    rank = torch.arange(1, len(used) + 1, dtype=torch.float64, device=used.device)
    weight = 1 / rank
    x, y = rank.log(), used.log()
    x_mean, y_mean = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
    slope = (weight * (x - x_mean) * (y - y_mean)).sum() / (weight * (x - x_mean).square()).sum()
    return float((y_mean - slope * x_mean).exp()), float(-slope)


def under_used(density: Tensor, margin: float) -> Tensor:
    """``[dict_size]`` bool: what is used less than ``margin`` of its place on the Zipf curve, or not at all."""
    check_range("under_used", "margin", margin, 0)
    scale, exponent = zipf_fit(density)
    rank = torch.empty_like(density, dtype=torch.float64)
    order = density.argsort(descending=True, stable=True)
    rank[order] = torch.arange(1, len(density) + 1, dtype=torch.float64, device=density.device)
    return (density <= 0) | (density < margin * scale * rank**-exponent)


class Usage(nn.Module):
    """Running means over batches: how often each atom is in a code, and how often it asks to be.

    Args:
        margin: see `under_used`; 0 leaves the dead alone.
        rate: weight of a new batch, once there were many; the mean is plain before.
    """

    density: Tensor
    batches: Tensor

    def __init__(self, margin: float, rate: float) -> None:
        super().__init__()
        check_range("Usage", "margin", margin, 0)
        check_range("Usage", "rate", rate, 0, 1)
        self.margin, self.rate = margin, rate

    def attach(self, dict_size: int) -> None:
        """Make the counts."""
        self.register_buffer("density", torch.zeros(dict_size))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def weight(self) -> float:
        """Of the next batch."""
        return max(self.rate, 1 / (int(self.batches) + 1))

    @torch.no_grad()
    def observe(self, codes: Codes) -> None:
        """Count a batch."""
        used = codes.indices[codes.values != 0].long()
        share = torch.bincount(used, minlength=codes.dict_size) / max(1, len(codes.values))
        self.density.lerp_(share.to(self.density.dtype), self.weight)
        self.batches += 1

    @torch.no_grad()
    def neglected(self, silent: Tensor, most: int) -> Tensor:
        """What the auxiliary loss trains, ``[dict_size]`` bool: what has been ``silent`` for long, then the under-used.

        Atoms that the loss could choose would crowd out the silent, whose pre-activations are lower; the under-used so
        only get what the silent leave of ``most`` places, the least used first.
        """
        room = most - int(silent.sum())
        if not self.margin or room <= 0:
            return silent
        under = under_used(self.density, self.margin) & ~silent
        first = self.density.masked_fill(~under, torch.inf).argsort(stable=True)[: min(room, int(under.sum()))]
        return silent.index_fill(0, first, True)
