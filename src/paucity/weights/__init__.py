"""Sparse weights: pruning after training."""

from .dsnot import DSnoT, dsnot_mask
from .essential import essential_sparsity
from .gradual import GradualPruning, train_sparse
from .iterative import Phase, Tickets, iterative_magnitude
from .kernel_groups import kernel_group_mask, kernel_group_masks, rearrange
from .magnitude import Magnitude, magnitude_mask, magnitude_score
from .packed import Packing, pack, unpack
from .pruning import AppliedWeights, prune
from .random import Random, random_score
from .sparse_conv import SparseConv1x1, fold_batchnorm, sparsify_convs
from .sparsegpt import SparseGPT, sparsegpt_sweep
from .taylor import Taylor, taylor_score
from .ticket_controls import random_masks, reinitialise, train_control
from .transfer import LinearProbe, VisualPrompt
from .wanda import Wanda, wanda_mask, wanda_score

__all__ = [
    "AppliedWeights",
    "DSnoT",
    "GradualPruning",
    "LinearProbe",
    "Magnitude",
    "Packing",
    "Phase",
    "Random",
    "SparseConv1x1",
    "SparseGPT",
    "Taylor",
    "Tickets",
    "VisualPrompt",
    "Wanda",
    "dsnot_mask",
    "essential_sparsity",
    "fold_batchnorm",
    "iterative_magnitude",
    "kernel_group_mask",
    "kernel_group_masks",
    "magnitude_mask",
    "magnitude_score",
    "pack",
    "prune",
    "random_masks",
    "random_score",
    "rearrange",
    "reinitialise",
    "sparsegpt_sweep",
    "sparsify_convs",
    "taylor_score",
    "train_control",
    "train_sparse",
    "unpack",
    "wanda_mask",
    "wanda_score",
]
