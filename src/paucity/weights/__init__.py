"""Sparse weights: pruning after training."""

from .dsnot import DSnoT, dsnot_mask
from .essential import essential_sparsity
from .iterative import Phase, Tickets, iterative_magnitude
from .magnitude import Magnitude, magnitude_mask, magnitude_score
from .packed import Packing, pack, unpack
from .pruning import AppliedWeights, prune
from .random import Random, random_score
from .sparsegpt import SparseGPT, sparsegpt_sweep
from .taylor import Taylor, taylor_score
from .ticket_controls import random_masks, reinitialise, train_control
from .transfer import LinearProbe, VisualPrompt
from .wanda import Wanda, wanda_mask, wanda_score

__all__ = [
    "AppliedWeights",
    "DSnoT",
    "LinearProbe",
    "Magnitude",
    "Packing",
    "Phase",
    "Random",
    "SparseGPT",
    "Taylor",
    "Tickets",
    "VisualPrompt",
    "Wanda",
    "dsnot_mask",
    "essential_sparsity",
    "iterative_magnitude",
    "magnitude_mask",
    "magnitude_score",
    "pack",
    "prune",
    "random_masks",
    "random_score",
    "reinitialise",
    "sparsegpt_sweep",
    "taylor_score",
    "train_control",
    "unpack",
    "wanda_mask",
    "wanda_score",
]
