"""All argument validation: every error reads ``{function}: {argument} must {constraint}, got {value}.``

Exceptions::

    ValueError
    └── InputError              what a caller passed is wrong; the command line shows it as one line, exit code 2
        └── InputTypeError      also a TypeError: the type is wrong
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line imports this module and must not wait for torch
    from torch import Tensor


class InputError(ValueError):
    """What a caller passed is wrong; nothing has been done yet."""


class InputTypeError(InputError, TypeError):
    """The type of what a caller passed is wrong."""


def fail(function: str, argument: str, constraint: str, value: object) -> InputError:
    """The error to raise for a constraint that has no check of its own."""
    return InputError(f"{function}: {argument} must {constraint}, got {value}.")


def check_tensor(function: str, argument: str, value: object) -> None:
    """Raise InputTypeError unless ``value`` is a tensor."""
    from torch import Tensor

    if not isinstance(value, Tensor):
        raise InputTypeError(f"{function}: {argument} must be a tensor, got {type(value).__name__}.")


def check_ndim(function: str, argument: str, tensor: Tensor, *ndims: int) -> None:
    """Raise InputError unless ``tensor`` has one of ``ndims`` dimensions."""
    check_tensor(function, argument, tensor)
    if tensor.ndim not in ndims:
        wanted = " or ".join(map(str, ndims))
        raise fail(function, argument, f"have {wanted} dimensions", f"shape {list(tensor.shape)}")


def check_shape(function: str, argument: str, tensor: Tensor, *shape: int | None) -> None:
    """Raise InputError unless ``tensor`` has ``shape``; None matches any size."""
    check_tensor(function, argument, tensor)
    if len(shape) != tensor.ndim or any(w is not None and w != g for w, g in zip(shape, tensor.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise fail(function, argument, f"have shape [{wanted}]", list(tensor.shape))


def check_floating(function: str, argument: str, tensor: Tensor) -> None:
    """Raise InputTypeError unless ``tensor`` has a floating dtype."""
    check_tensor(function, argument, tensor)
    if not tensor.is_floating_point():
        raise InputTypeError(f"{function}: {argument} must be floating point, got {tensor.dtype}.")


def check_bool(function: str, argument: str, tensor: Tensor) -> None:
    """Raise InputTypeError unless ``tensor`` is a bool mask."""
    check_tensor(function, argument, tensor)
    if str(tensor.dtype) != "torch.bool":
        raise InputTypeError(f"{function}: {argument} must be bool, got {tensor.dtype}.")


def check_sparsity(function: str, value: float, argument: str = "sparsity") -> None:
    """Raise InputError unless ``value`` is in [0, 1)."""
    _check_real(function, argument, value)
    if not 0 <= value < 1:
        raise fail(function, argument, "be in [0, 1)", value)


def check_range(
    function: str,
    argument: str,
    value: float,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise InputError unless ``value`` lies between ``low`` and ``high``, ends included unless open."""
    _check_real(function, argument, value)
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        left, right = "(" if open_low or low == -math.inf else "[", ")" if open_high or high == math.inf else "]"
        raise fail(function, argument, f"be in {left}{low:g}, {high:g}{right}", value)


def check_int(function: str, argument: str, value: int, low: int = 1, high: int | None = None) -> None:
    """Raise unless ``value`` is an int of at least ``low`` and at most ``high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"{function}: {argument} must be an integer, got {value!r}.")
    if value < low or (high is not None and value > high):
        wanted = f"be at least {low}" if high is None else f"be in [{low}, {high}]"
        raise fail(function, argument, wanted, value)


def check_divides(function: str, argument: str, divisor: int, size: int, what: str) -> None:
    """Raise InputError unless ``divisor`` divides ``size`` (the size of ``what``)."""
    if size % divisor:
        raise fail(function, argument, f"divide {what} ({size})", divisor)


def check_nm(function: str, n: int, m: int) -> None:
    """Raise InputError unless 1 <= n <= m."""
    check_int(function, "m", m)
    check_int(function, "n", n)
    if n > m:
        raise fail(function, "n", f"be at most m ({m})", n)


def check_choice(function: str, argument: str, value: str, choices: Collection[str]) -> None:
    """Raise InputError that lists ``choices``, and names the nearest, unless ``value`` is one of them."""
    if value not in choices:
        wanted = f"be one of {', '.join(sorted(choices))}"
        raise InputError(f"{function}: {argument} must {wanted}, got {value}{did_you_mean(value, choices)}.")


def did_you_mean(value: str, choices: Collection[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest of ``choices``, or an empty string."""
    near = difflib.get_close_matches(value, list(choices), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _check_real(function: str, argument: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputTypeError(f"{function}: {argument} must be a number, got {value!r}.")
    if math.isnan(value):
        raise fail(function, argument, "be a number", value)
