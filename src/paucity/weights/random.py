"""Random pruning: the control that every score has to beat.

Paper: Liu et al. 2022 (The Unreasonable Effectiveness of Random Pruning), https://arxiv.org/abs/2202.02643, whose layer
ratios are the allocations ``uniform`` and ``erk``. There the pruned network is trained afterwards, which
`paucity.ops.formats.Masks.install` allows; here counts are exact where the public mask is drawn entry by entry.
"""

import zlib
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .pruner import Layer, Pruner


class Random(Pruner):
    """Options of ``random``."""

    seed: Annotated[int, Field(ge=0, lt=2**32, description="of the masks; each layer has draws of its own")] = 0

    def score(self, layer: Layer) -> Tensor:
        """See `random_score`."""
        # crc32 tells layers apart in the same way in every process, as hash() does not.
        generator = torch.Generator().manual_seed(self.seed * 2**32 + zlib.crc32(layer.name.encode()))
        return random_score(layer.weight, generator=generator)


def random_score(weight: Tensor, *, generator: torch.Generator) -> Tensor:
    """Uniform draws in [0, 1), float32, of the shape of ``weight``; weights that are 0 come last."""
    draws = torch.rand(weight.shape, generator=generator).to(weight.device)
    return draws.masked_fill(weight == 0, -1.0)
