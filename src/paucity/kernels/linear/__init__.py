"""Linears that read less than the dense weight: some inputs, some outputs, or packed weights."""

from .packed import packed_linear
from .sparse import input_major, masked_input_linear, sparse_input_linear, sparse_output_linear

__all__ = ["input_major", "masked_input_linear", "packed_linear", "sparse_input_linear", "sparse_output_linear"]
