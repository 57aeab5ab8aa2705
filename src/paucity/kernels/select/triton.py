"""Triton twins: a program walks a row in chunks, as often as the choice needs, and writes what stays in order."""
# mypy: disable-error-code="import-untyped, untyped-decorator"

import math
import statistics

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 4096  # entries of a row that a program holds at a time


def topk(x: Tensor, k: int, by_abs: bool) -> tuple[Tensor, Tensor]:
    """As `reference.topk`."""
    rows, size = x.shape
    x, indices = x.contiguous(), x.new_empty(rows, k, dtype=torch.int32)
    if not indices.numel():
        return x.new_empty(rows, k), indices
    keys = torch.empty_like(indices)
    _topk[(rows,)](x, None, indices, keys, None, size, k, ABS=by_abs, CHUNK=_chunk(size), num_warps=_warps(size))
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    indices = indices.gather(-1, order)
    return x.gather(-1, indices.long()), indices


def topk_mask(x: Tensor, k: int, by_abs: bool, norm: Tensor | None = None) -> Tensor:
    """As `reference.topk_mask`; with ``norm [size]`` of ``x * norm`` or ``|x| * norm``."""
    rows, size = x.shape
    x, mask = x.contiguous(), torch.empty(x.shape, dtype=torch.bool, device=x.device)
    if not mask.numel() or not k:
        return mask.fill_(False)
    _topk[(rows,)](x, norm, None, None, mask, size, k, ABS=by_abs, CHUNK=_chunk(size), num_warps=_warps(size))
    return mask


def threshold_select(x: Tensor, threshold: Tensor, capacity: int, by_abs: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.threshold_select`."""
    return _select(x, threshold.contiguous(), 0.0, capacity, by_abs)


def statistical_topk(x: Tensor, k: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.statistical_topk`; mean and deviation are summed in another order than there."""
    sparsity = 1 - k / max(1, x.shape[1])
    if not sparsity:
        all_finite = torch.full((len(x),), -math.inf, device=x.device)
        return _select(x, all_finite, 0.0, capacity, False)
    return _select(x, None, statistics.NormalDist().inv_cdf(sparsity), capacity, False)


def _select(
    x: Tensor, threshold: Tensor | None, deviations: float, capacity: int, by_abs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, size = x.shape
    values, indices = x.new_empty(rows, capacity), x.new_empty(rows, capacity, dtype=torch.int32)
    counts = x.new_empty(rows, dtype=torch.int32)
    if rows:
        _above[(rows,)](
            x.contiguous(),
            threshold,
            deviations,
            values,
            indices,
            counts,
            size,
            capacity,
            ABS=by_abs,
            CHUNK=_chunk(size),
            num_warps=_warps(size),
        )
    return values, indices, counts


def _chunk(size: int) -> int:
    return min(_CHUNK, int(triton.next_power_of_2(max(size, 1))))


def _warps(size: int) -> int:
    return 8 if size > 1024 else 4


@triton.jit
def _widen(value: tl.tensor) -> tl.tensor:
    """In float32, subnormal numbers included, which the interpreter's own conversion spoils."""
    if value.dtype == tl.bfloat16:
        wide = (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = value.to(tl.float32)
    return wide


@triton.jit
def _load_score(score: tl.tensor, norm: tl.tensor, at: tl.tensor, size: tl.tensor, ABS: tl.constexpr) -> tl.tensor:
    """The scores at ``at`` in float32, NaN outside the row."""
    value = _widen(tl.load(score + at, mask=at < size, other=float("nan")))
    if ABS:
        value = tl.abs(value)
    if norm is not None:
        value *= tl.load(norm + at, mask=at < size, other=0.0)
    return value


@triton.jit
def _rank_key(value: tl.tensor) -> tl.tensor:
    """Integers from 0 to 2^32 - 1 in the order of the float32 scores, with NaN below all others and -0 equal to +0."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -magnitude, magnitude).to(tl.int64) + 2147483648
    return tl.where(magnitude <= 0x7F800000, key, 0)


@triton.jit
def _topk(
    score: tl.tensor,
    norm: tl.tensor,
    indices: tl.tensor,
    keys: tl.tensor,
    mask: tl.tensor,
    size: tl.tensor,
    k: tl.tensor,
    ABS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    score += row * size
    # The k-th highest key, eight bits at a time: counts of the digits of all keys that share the digits found so far.
    lowest = tl.full((), 0, tl.int64)
    room = k
    digits = tl.arange(0, 256)
    for shift in tl.static_range(24, -1, -8):
        counts = tl.zeros((256,), tl.int32)
        for first in range(0, size, CHUNK):
            at = first + tl.arange(0, CHUNK)
            key = _rank_key(_load_score(score, norm, at, size, ABS))
            same = (at < size) & ((key >> (shift + 8)) == lowest)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=same)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
        chosen = (above < room) & (above + counts >= room)
        lowest = lowest * 256 + tl.sum(tl.where(chosen, digits, 0), 0)
        room -= tl.sum(tl.where(chosen, above, 0), 0)
    # Of the keys equal to the lowest that stays, the first ones stay.
    found = tl.full((), 0, tl.int32)
    tied_before = tl.full((), 0, tl.int32)
    for first in range(0, size, CHUNK):
        at = first + tl.arange(0, CHUNK)
        key = _rank_key(_load_score(score, norm, at, size, ABS))
        tied = ((at < size) & (key == lowest)).to(tl.int32)
        kept = (at < size) & ((key > lowest) | ((tied > 0) & (tied_before + tl.cumsum(tied, 0) <= room)))
        if indices is not None:
            rank = found + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(indices + row * k + rank, at, mask=kept)
            tl.store(keys + row * k + rank, (key - 2147483648).to(tl.int32), mask=kept)
        if mask is not None:
            tl.store(mask + row * size + at, kept, mask=at < size)
        found += tl.sum(kept.to(tl.int32), 0)
        tied_before += tl.sum(tied, 0)


@triton.jit
def _statistical_threshold(score: tl.tensor, size: tl.tensor, deviations: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    total = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, size, CHUNK):
        at = first + tl.arange(0, CHUNK)
        total += tl.load(score + at, mask=at < size, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / size
    # A row with infinities or NaN has no deviation, as in the reference.
    finite = tl.abs(mean) < float("inf")
    middle = tl.where(finite, mean, 0.0)
    used = tl.where(finite, size, 0)
    squares = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, size, CHUNK):
        at = first + tl.arange(0, CHUNK)
        off = tl.load(score + at, mask=at < used, other=0.0).to(tl.float32) - middle
        squares += tl.where(at < used, off * off, 0.0)
    threshold = mean + tl.sqrt(tl.sum(squares, 0) / size) * deviations
    if score.dtype.element_ty == tl.bfloat16:
        # To the nearest, also in the interpreter, whose conversion cuts off.
        bits = threshold.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        threshold = tl.where(threshold == threshold, nearest, threshold)
    return threshold.to(score.dtype.element_ty).to(tl.float32)


@triton.jit
def _above(
    score: tl.tensor,
    thresholds: tl.tensor,
    deviations: tl.tensor,
    values: tl.tensor,
    indices: tl.tensor,
    counts: tl.tensor,
    size: tl.tensor,
    capacity: tl.tensor,
    ABS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    score += row * size
    if thresholds is None:
        threshold = _statistical_threshold(score, size, deviations, CHUNK)
    else:
        threshold = tl.load(thresholds + row)
    values += row * capacity
    indices += row * capacity
    found = tl.full((), 0, tl.int32)
    for first in range(0, size, CHUNK):
        at = first + tl.arange(0, CHUNK)
        value = tl.load(score + at, mask=at < size, other=0.0)
        compared = tl.abs(_widen(value)) if ABS else _widen(value)
        kept = (at < size) & (compared > threshold)
        rank = found + tl.cumsum(kept.to(tl.int32), 0) - 1
        fits = kept & (rank < capacity)
        tl.store(values + rank, value, mask=fits)
        tl.store(indices + rank, at, mask=fits)
        found += tl.sum(kept.to(tl.int32), 0)
    for first in range(0, capacity, CHUNK):
        slot = first + tl.arange(0, CHUNK)
        unused = (slot >= found) & (slot < capacity)
        tl.store(values + slot, 0.0, mask=unused)
        tl.store(indices + slot, -1, mask=unused)
    tl.store(counts + row, found)
