"""Selectors: from a score (higher is kept) to a bool mask (True is kept) or to indices.

One order rules everywhere: a higher score wins, between equal scores the lower position wins, NaN loses to everything
(also to -inf). A score has any float or integer dtype and at least one dimension; no gradient flows through a choice.
``dim`` is the dimension whose entries compete; ``by_abs`` ranks by absolute value. All functions raise InputError for a
``k``, ``dim``, ``sparsity`` or ``p`` out of range and InputTypeError for a dtype that has no order.
"""

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from ..checks import (
    InputTypeError,
    check_divides,
    check_floating,
    check_int,
    check_nm,
    check_range,
    check_sparsity,
    check_tensor,
    fail,
)

_INT_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def num_kept(size: int, sparsity: float) -> int:
    """How many of ``size`` entries stay at ``sparsity``: the one place with rounding (of those removed, half to even).

    Examples:
        >>> num_kept(10, 0.75)
        2
    """
    check_int("num_kept", "size", size, 0)
    check_sparsity("num_kept", sparsity)
    return size - round(size * sparsity)


def topk_indices(score: Tensor, k: int, *, dim: int = -1, by_abs: bool = False) -> Tensor:
    """Positions (int64) of the ``k`` highest scores along ``dim``, best first; ``dim`` has size ``k`` in the result.

    Examples:
        >>> topk_indices(torch.tensor([1, 3, 3, 2]), 3)
        tensor([1, 2, 3])
    """
    key = _row_keys("topk_indices", score, dim, by_abs)
    check_int("topk_indices", "k", k, 0, key.shape[-1])
    kept = _kept(key, k).flatten().nonzero().squeeze(-1) % max(1, key.shape[-1])
    kept = kept.view(*key.shape[:-1], k)
    order = key.gather(-1, kept).sort(dim=-1, descending=True, stable=True).indices
    return kept.gather(-1, order).movedim(-1, dim)


def topk_mask(
    score: Tensor, *, k: int | None = None, sparsity: float | None = None, dim: int = -1, by_abs: bool = False
) -> Tensor:
    """Mask (bool, the shape of ``score``) of the highest scores of every row along ``dim``.

    Exactly one of ``k``, how many stay in a row, and ``sparsity``, the fraction removed (see `num_kept`), is given.

    Examples:
        >>> topk_mask(torch.tensor([1.0, 3.0, 3.0, 2.0]), k=1)
        tensor([False,  True, False, False])
    """
    key = _row_keys("topk_mask", score, dim, by_abs)
    kept = _kept(key, _resolve_k("topk_mask", key.shape[-1], k, sparsity))
    return kept.movedim(-1, dim).contiguous()


def global_topk_mask(
    score: Tensor, *, k: int | None = None, sparsity: float | None = None, by_abs: bool = False
) -> Tensor:
    """Like `topk_mask`, with all entries of the tensor in one competition (ties by position in row-major order)."""
    _check_score("global_topk_mask", score)
    kept = _kept(_rank_key(score, by_abs).flatten(), _resolve_k("global_topk_mask", score.numel(), k, sparsity))
    return kept.view(score.shape)


def global_topk_masks(
    scores: Mapping[str, Tensor], *, k: int | None = None, sparsity: float | None = None, by_abs: bool = False
) -> dict[str, Tensor]:
    """Like `global_topk_mask`, with all entries of several named tensors (of one dtype) in one competition."""
    if not scores:
        raise fail("global_topk_masks", "scores", "hold at least one tensor", "none")
    for score in scores.values():
        _check_score("global_topk_masks", score)
    if len(dtypes := {score.dtype for score in scores.values()}) > 1:
        raise InputTypeError(f"global_topk_masks: scores must share one dtype, got {sorted(map(str, dtypes))}.")
    key = torch.cat([_rank_key(score, by_abs).flatten() for score in scores.values()])
    kept = _kept(key, _resolve_k("global_topk_masks", key.numel(), k, sparsity))
    parts = torch.split(kept, [score.numel() for score in scores.values()])
    return {name: part.view(score.shape).clone() for (name, score), part in zip(scores.items(), parts, strict=True)}


def batch_topk_mask(score: Tensor, *, k: int, dim: int = -1, by_abs: bool = False) -> Tensor:
    """Mask of the ``k * rows`` highest scores of the whole tensor: ``k`` a row on average, more in higher rows."""
    _check_score("batch_topk_mask", score)
    _check_dim("batch_topk_mask", "score", score, dim)
    check_int("batch_topk_mask", "k", k, 0, score.shape[dim])
    return global_topk_mask(score, k=k * (score.numel() // max(1, score.shape[dim])), by_abs=by_abs)


def threshold_mask(score: Tensor, threshold: float | Tensor, *, by_abs: bool = False) -> Tensor:
    """Mask ``score > threshold`` (or ``|score| > threshold``); NaN is removed.

    A tensor as threshold must broadcast to the shape of ``score``.
    """
    _check_score("threshold_mask", score)
    if not isinstance(threshold, Tensor):
        check_range("threshold_mask", "threshold", threshold)
    elif threshold.ndim > score.ndim or any(
        size not in (1, whole) for size, whole in zip(threshold.shape[::-1], score.shape[::-1], strict=False)
    ):
        wanted = f"broadcast to the shape of score {list(score.shape)}"
        raise fail("threshold_mask", "threshold", wanted, f"shape {list(threshold.shape)}")
    return (_absolute(score) if by_abs else score) > threshold


def top_p_mask(prob: Tensor, *, p: float, dim: int = -1) -> Tensor:
    """Mask of the fewest largest entries of a row whose sum reaches ``p``; at least one entry.

    Args:
        prob: non-negative masses, float; a row need not sum to 1. Negative and NaN entries rank last and add no mass.
        p: the mass to reach, in (0, 1]. A row that never reaches it is kept whole.
        dim: of a row.

    Examples:
        >>> top_p_mask(torch.tensor([0.125, 0.5, 0.25, 0.125]), p=0.75)
        tensor([False,  True,  True, False])
    """
    check_floating("top_p_mask", "prob", prob)
    check_range("top_p_mask", "p", p, 0, 1, open_low=True)
    _check_dim("top_p_mask", "prob", prob, dim)
    rows = prob.detach().movedim(dim, -1)
    order = _rank_key(rows).sort(dim=-1, descending=True, stable=True).indices
    mass = rows.nan_to_num(0.0).clamp_min(0).gather(-1, order).double()
    kept = mass.cumsum(-1) - mass < p
    return torch.zeros_like(kept).scatter(-1, order, kept).movedim(-1, dim).contiguous()


def nm_mask(score: Tensor, *, n: int, m: int, dim: int = -1) -> Tensor:
    """Mask that keeps the ``n`` highest of every ``m`` consecutive scores along ``dim``.

    Raises:
        InputError: if ``n > m`` or ``m`` does not divide the size of ``dim``.

    Examples:
        >>> nm_mask(torch.tensor([1, 2, 3, 4]), n=1, m=2)
        tensor([False,  True, False,  True])
    """
    check_nm("nm_mask", n, m)
    key = _row_keys("nm_mask", score, dim)
    check_divides("nm_mask", "m", m, key.shape[-1], f"the size of dim {dim}")
    return _kept(key.reshape(*key.shape[:-1], key.shape[-1] // m, m), n).flatten(-2).movedim(-1, dim).contiguous()


def block_topk_mask(score: Tensor, *, block: tuple[int, ...], sparsity: float) -> Tensor:
    """Mask of whole blocks, ranked by the sum of their scores.

    Args:
        score: ``[..., *tiled]``; the last ``len(block)`` dimensions are tiled, the leading ones compete separately.
        block: the size of a block in each tiled dimension.
        sparsity: the fraction of blocks to remove.

    Raises:
        InputError: if ``block`` is empty, has more dimensions than ``score`` or does not divide them.
    """
    _check_score("block_topk_mask", score)
    if not 0 < len(block) <= score.ndim:
        raise fail("block_topk_mask", "block", f"have between 1 and {score.ndim} sizes", block)
    lead, tiled = score.shape[: -len(block)], score.shape[-len(block) :]
    for size, whole in zip(block, tiled, strict=True):
        check_int("block_topk_mask", "block", size)
        check_divides("block_topk_mask", "block", size, whole, "a tiled dimension")
    grid = [whole // size for size, whole in zip(block, tiled, strict=True)]
    inner = tuple(range(len(lead) + 1, len(lead) + 2 * len(block), 2))
    split = [part for pair in zip(grid, block, strict=True) for part in pair]
    wide = torch.promote_types(score.dtype, torch.float32) if score.is_floating_point() else torch.int64
    key = _rank_key(score.detach().reshape(*lead, *split).sum(inner, dtype=wide)).flatten(len(lead))
    kept = _kept(key, num_kept(key.shape[-1], sparsity)).view(*lead, *(part for size in grid for part in (size, 1)))
    return kept.expand(*lead, *split).reshape(score.shape)


def statistical_threshold(x: Tensor, *, sparsity: float, dim: int = -1) -> Tensor:
    """The value that a fraction ``sparsity`` of a normally distributed row stays below, without sorting.

    ``mean(x) + std(x) * Phi^-1(sparsity)`` with the population standard deviation.
    Paper: You et al. 2025 (Spark Transformer), https://arxiv.org/abs/2506.06644. Differentiable in ``x``.

    Args:
        x: any shape, float.
        sparsity: expected fraction removed, in [0, 1); 0 gives -inf.
        dim: the dimension of a row; it stays in the result (dtype of ``x``) with size 1.
    """
    check_floating("statistical_threshold", "x", x)
    check_sparsity("statistical_threshold", sparsity)
    _check_dim("statistical_threshold", "x", x, dim)
    rows = x.to(torch.promote_types(x.dtype, torch.float32))
    if sparsity == 0 or not x.shape[dim]:
        return torch.full_like(x.sum(dim, keepdim=True), -math.inf)
    variance = rows.var(dim, keepdim=True, correction=0)
    # The root has no gradient at 0: a constant row has a constant threshold.
    std = torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)
    return (rows.mean(dim, keepdim=True) + std * statistics.NormalDist().inv_cdf(sparsity)).to(x.dtype)


def statistical_topk_mask(x: Tensor, *, sparsity: float, dim: int = -1) -> Tensor:
    """Mask of the entries above `statistical_threshold`; the share kept is right only as far as a row is normal."""
    return x.detach() > statistical_threshold(x.detach(), sparsity=sparsity, dim=dim)


def _check_score(function: str, score: Tensor) -> None:
    check_tensor(function, "score", score)
    if score.is_complex() or score.dtype in (torch.bool, torch.uint64):
        raise InputTypeError(f"{function}: score must be real numbers, got {score.dtype}.")


def _check_dim(function: str, argument: str, tensor: Tensor, dim: int = -1) -> None:
    if not tensor.ndim:
        raise fail(function, argument, "have at least 1 dimension", "a scalar")
    check_int(function, "dim", dim, -tensor.ndim, tensor.ndim - 1)


def _resolve_k(function: str, size: int, k: int | None, sparsity: float | None) -> int:
    if k is not None and sparsity is None:
        check_int(function, "k", k, 0, size)
        return k
    if sparsity is None or k is not None:
        raise fail(function, "exactly one of k and sparsity", "be given", "neither" if k is None else "both")
    check_sparsity(function, sparsity)
    return num_kept(size, sparsity)


def _absolute(score: Tensor) -> Tensor:
    # Integers widen first: the lowest int8 has no absolute value in int8.
    return score.abs() if score.is_floating_point() else score.to(torch.int64).abs()


def _row_keys(function: str, score: Tensor, dim: int, by_abs: bool = False) -> Tensor:
    _check_score(function, score)
    _check_dim(function, "score", score, dim)
    return _rank_key(score, by_abs).movedim(dim, -1)


def _rank_key(score: Tensor, by_abs: bool = False) -> Tensor:
    """Integers in the order of the scores, equal where these are equal, with NaN below all others."""
    score = _absolute(score.detach()) if by_abs else score.detach()
    if not score.is_floating_point():
        return score.to(torch.int64) if score.dtype in (torch.uint16, torch.uint32) else score
    if score.itemsize == 1:
        score = score.float()
    # Adding 0 makes -0 to +0. The bits of a negative float count upwards in magnitude: all but the sign are flipped.
    bits = (score + 0.0).view(_INT_OF_SIZE[score.itemsize])
    limits = torch.iinfo(bits.dtype)
    return torch.where(bits < 0, bits ^ limits.max, bits).masked_fill(score.isnan(), limits.min)


def _kept(key: Tensor, k: int) -> Tensor:
    """Mask of the ``k`` highest keys along the last dimension; of the keys equal to the lowest kept, the first ones."""
    if k == 0 or key.numel() == 0:
        return torch.zeros_like(key, dtype=torch.bool)
    lowest = key.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, tied = key > lowest, key == lowest
    room = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))
