"""The C++ twin; see csrc/kernels/gram.cpp."""

from torch import Tensor

from ..native import DTYPES, INT, Pointer, function
from . import reference

_gram = function("gram", *[Pointer] * 2, *[INT] * 4)
_squares = function("squares", *[Pointer] * 2, *[INT] * 3)


def add(gram: Tensor, inputs: Tensor) -> None:
    """As in the reference, for float32 and bfloat16; rows that are packed too close are its affair."""
    tokens, size = inputs.shape
    if gram.stride(0) < -(-size // 16) * 16:
        reference.add(gram, inputs)
    elif inputs.numel():
        _gram(inputs.contiguous(), gram, tokens, size, gram.stride(0), DTYPES[inputs.dtype])


def add_squares(squares: Tensor, inputs: Tensor) -> None:
    """As in the reference, for float32 and bfloat16."""
    if inputs.numel():
        _squares(inputs.contiguous(), squares, *inputs.shape, DTYPES[inputs.dtype])
