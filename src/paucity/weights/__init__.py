"""Sparse weights: pruning after training."""

from .dsnot import DSnoT, dsnot_mask
from .magnitude import Magnitude, magnitude_mask, magnitude_score
from .packed import Packing, pack, unpack
from .pruning import AppliedWeights, prune
from .random import Random, random_score
from .sparsegpt import SparseGPT, sparsegpt_sweep
from .taylor import Taylor, taylor_score
from .wanda import Wanda, wanda_mask, wanda_score

__all__ = [
    "AppliedWeights",
    "DSnoT",
    "Magnitude",
    "Packing",
    "Random",
    "SparseGPT",
    "Taylor",
    "Wanda",
    "dsnot_mask",
    "magnitude_mask",
    "magnitude_score",
    "pack",
    "prune",
    "random_score",
    "sparsegpt_sweep",
    "taylor_score",
    "unpack",
    "wanda_mask",
    "wanda_score",
]
