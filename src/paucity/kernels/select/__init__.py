"""Selection in rows: the best entries of each, or those above a threshold, with their positions, or a mask of the best.

The rules are those of `paucity.ops.select`. Gradients reach the selected entries through the values. Indices and
counts are int32.
"""

import math

import torch
from torch import Tensor

from ...checks import check_floating, check_int, check_range, fail
from ..dispatch import check_computable
from . import op

__all__ = ["statistical_topk", "threshold_select", "topk", "topk_mask"]


def topk(x: Tensor, k: int, *, by_abs: bool = False) -> tuple[Tensor, Tensor]:
    """The ``k`` highest entries of each row, best first; of equal ones the lower position wins, NaN comes last.

    Args:
        x: ``[..., n]``, any float dtype.
        k: entries of a row, at most ``n``.
        by_abs: rank by absolute value; the values come back with their sign.

    Returns:
        values ``[..., k]`` (dtype of ``x``), indices ``[..., k]`` (int32).

    Raises:
        InputError: if ``k`` is not in ``[0, n]``.
        InputTypeError: if ``x`` is not a float tensor.
    """
    rows = _rows("topk", x)
    check_int("topk", "k", k, 0, x.shape[-1])
    values, indices = op.topk(rows, k, by_abs)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def topk_mask(x: Tensor, k: int, *, by_abs: bool = False) -> Tensor:
    """Mask (bool, ``[..., n]``) of the entries that `topk` gives, for the same arguments and with the same errors."""
    rows = _rows("topk_mask", x)
    check_int("topk_mask", "k", k, 0, x.shape[-1])
    mask: Tensor = op.topk_mask(rows, k, by_abs)
    return mask.view(x.shape)


def threshold_select(
    x: Tensor, threshold: float | Tensor, *, capacity: int, by_abs: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of each row with ``x > threshold`` (or ``|x| > threshold``), in the order of their positions.

    Where a row has more than ``capacity`` such entries, the first ``capacity`` of them are returned; its count tells.

    Args:
        x: ``[..., n]``, any float dtype.
        threshold: a number, or a float tensor that broadcasts to ``[..., 1]``; compared in float32 at least. No
            gradient flows to it.
        capacity: slots of a row, at most ``n``.
        by_abs: compare absolute values; the values come back with their sign.

    Returns:
        values ``[..., capacity]`` (dtype of ``x``; unused slots are 0), indices ``[..., capacity]`` (int32; unused
        slots are -1) and counts ``[...]`` (int32): how many entries are above the threshold, also beyond ``capacity``.

    Raises:
        InputError: if ``capacity`` is not in ``[0, n]`` or the threshold does not broadcast or is not a number.
        InputTypeError: if a tensor is not floating point.
    """
    rows = _rows("threshold_select", x)
    check_int("threshold_select", "capacity", capacity, 0, x.shape[-1])
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(threshold, Tensor):
        check_floating("threshold_select", "threshold", threshold)
        try:
            each = threshold.detach().to(wide).expand(*x.shape[:-1], 1).reshape(len(rows))
        except RuntimeError:
            wanted = f"broadcast to {[*x.shape[:-1], 1]}"
            raise fail("threshold_select", "threshold", wanted, f"shape {list(threshold.shape)}") from None
        if threshold.device != x.device:
            raise fail("threshold_select", "threshold", f"be on {x.device}", threshold.device)
    else:
        check_range("threshold_select", "threshold", threshold)
        if abs(threshold) > torch.finfo(wide).max:  # rounded as a tensor of thresholds would be
            threshold = math.copysign(math.inf, threshold)
        each = torch.full((len(rows),), threshold, dtype=wide, device=x.device)
    return _slots(x, op.threshold_select(rows, each, capacity, by_abs))


def statistical_topk(x: Tensor, k: int, *, capacity: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """About ``k`` entries of each row, those above ``mean + std * Phi^-1(1 - k / n)``, without sorting.

    Exact only as far as a row is normally distributed; the counts tell. See `paucity.ops.select.statistical_threshold`.
    Paper: You et al. 2025 (Spark Transformer), https://arxiv.org/abs/2506.06644. The gradient of the threshold, which
    the paper's soft threshold has, is not part of this: gradients flow through the values only.

    Args:
        x: ``[..., n]``, any float dtype.
        k: expected entries of a row, in ``[1, n]``; ``n`` selects all above -inf.
        capacity: slots of a row, at most ``n``; None is ``k`` and a quarter, and 16 more. Of a row with more entries
            the first ``capacity`` are returned.

    Returns:
        values ``[..., capacity]`` (dtype of ``x``; unused slots are 0), indices ``[..., capacity]`` (int32; unused
        slots are -1) and counts ``[...]`` (int32), also beyond ``capacity``.

    Raises:
        InputError: if ``k`` or ``capacity`` is out of range.
        InputTypeError: if ``x`` is not a float tensor.
    """
    rows = _rows("statistical_topk", x)
    check_int("statistical_topk", "k", k, 1, x.shape[-1])
    if capacity is None:
        capacity = min(x.shape[-1], math.ceil(1.25 * k) + 16)
    check_int("statistical_topk", "capacity", capacity, 0, x.shape[-1])
    return _slots(x, op.statistical_topk(rows, k, capacity))


def _rows(function: str, x: Tensor) -> Tensor:
    check_computable(function, "x", x)
    if x.ndim == 0:
        raise fail(function, "x", "have at least 1 dimension", "a scalar")
    if x.shape[-1] > torch.iinfo(torch.int32).max:
        raise fail(function, "x", "have rows of at most 2^31 - 1 entries", f"shape {list(x.shape)}")
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _slots(x: Tensor, result: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    values, indices, counts = result
    lead = x.shape[:-1]
    return values.view(*lead, values.shape[-1]), indices.view(*lead, indices.shape[-1]), counts.view(lead)
