"""Sparse activations: inputs and gates of linear layers that are skipped token by token."""

from .base import AppliedActivations
from .cats import cats_mask, cats_threshold
from .teal import teal_mask, teal_threshold
from .wina import column_norm, wina_mask, wina_score

__all__ = [
    "AppliedActivations",
    "cats_mask",
    "cats_threshold",
    "column_norm",
    "teal_mask",
    "teal_threshold",
    "wina_mask",
    "wina_score",
]
