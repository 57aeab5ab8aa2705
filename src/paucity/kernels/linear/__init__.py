"""Linears that read less than the dense weight: some inputs, some outputs, or packed weights."""

from .module import PackedLinear
from .packed import packed_linear
from .sparse import input_major, masked_input_linear, pays, sparse_input_linear, sparse_output_linear

__all__ = [
    "PackedLinear",
    "input_major",
    "masked_input_linear",
    "packed_linear",
    "pays",
    "sparse_input_linear",
    "sparse_output_linear",
]
