"""Gram matrices of inputs in float32, and their diagonals in float64, whatever the inputs are."""

from torch import Tensor

from ...checks import InputTypeError, check_ndim, check_shape, fail
from ..dispatch import check_computable, check_devices
from . import op

__all__ = ["add_gram", "add_squares", "empty_gram"]

_ROUND = 16


def empty_gram(size: int) -> Tensor:
    """Zeros ``[size, size]`` float32 for `add_gram`, in rows that lie as its native twin wants them."""
    return op.zeros(size, -(-size // _ROUND) * _ROUND)[:, :size]


def add_gram(gram: Tensor, inputs: Tensor) -> None:
    """Add ``X^T X`` to ``gram`` in place, on and below the diagonal; what is above is undefined.

    Products of bfloat16 are exact in the float32 in which all is summed, so bfloat16 inputs lose nothing.

    Args:
        gram: ``[in, in]`` float32, best from `empty_gram`.
        inputs: ``[tokens, in]``, any float dtype.

    Raises:
        InputError: if shapes or devices do not fit.
        InputTypeError: if a dtype does not fit.
    """
    name = "add_gram"
    check_computable(name, "inputs", inputs)
    check_ndim(name, "inputs", inputs, 2)
    check_shape(name, "gram", gram, inputs.shape[1], inputs.shape[1])
    check_devices(name, inputs.device, gram=gram)
    if gram.dtype != op.SUM:
        raise InputTypeError(f"{name}: gram must be {op.SUM}, got {gram.dtype}.")
    if gram.stride(1) != 1 and gram.numel() > 1:
        raise fail(name, "gram", "have contiguous rows", f"strides {gram.stride()}")
    op.add_gram(gram, inputs.detach())


def add_squares(squares: Tensor, inputs: Tensor) -> None:
    """Add the squares of each column of ``inputs`` to ``squares`` in place: the diagonal of the Gram matrix.

    Args:
        squares: ``[in]`` float64, contiguous, on the CPU.
        inputs: ``[tokens, in]``, any float dtype; its sums are float32 within some hundred tokens.

    Raises:
        InputError: if the shapes do not fit, or ``squares`` is not contiguous.
        InputTypeError: if a dtype does not fit.
    """
    name = "add_squares"
    check_computable(name, "inputs", inputs)
    check_ndim(name, "inputs", inputs, 2)
    check_shape(name, "squares", squares, inputs.shape[1])
    if squares.dtype != op.TOTAL:
        raise InputTypeError(f"{name}: squares must be {op.TOTAL}, got {squares.dtype}.")
    if not squares.is_contiguous():
        raise fail(name, "squares", "be contiguous", f"strides {squares.stride()}")
    op.add_squares(squares, inputs.detach())
