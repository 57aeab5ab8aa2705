"""Sparse weights: pruning after training."""

from .apply import AppliedWeights, prune
from .magnitude import magnitude_mask, magnitude_score
from .wanda import wanda_mask, wanda_score

__all__ = ["AppliedWeights", "magnitude_mask", "magnitude_score", "prune", "wanda_mask", "wanda_score"]
