"""Triton twins: a program walks a row in chunks, as often as the choice needs, and writes what stays in order."""
# mypy: disable-error-code="import-untyped, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 4096


def _chunk(size: int) -> int:
    return min(_CHUNK, int(triton.next_power_of_2(max(size, 1))))


def kept_mask(score: Tensor, norm: Tensor | None, k: int) -> Tensor:
    """Mask (bool, the shape of ``score`` ``[rows, size]``) of the ``k`` highest ``|score| * norm`` of a row."""
    score = score.contiguous()
    rows, size = score.shape
    if not score.numel() or not k:
        return torch.zeros_like(score, dtype=torch.bool)
    mask = torch.empty_like(score, dtype=torch.bool)
    _topk[(rows,)](score, norm, None, mask, size, k, size, ABS=True, CHUNK=_chunk(size))
    return mask


@triton.jit
def _load_score(score: tl.tensor, norm: tl.tensor, at: tl.tensor, size: tl.tensor, ABS: tl.constexpr) -> tl.tensor:
    """The scores at ``at`` in float32, NaN outside the row."""
    value = tl.load(score + at, mask=at < size, other=float("nan")).to(tl.float32)
    if ABS:
        value = tl.abs(value)
    if norm is not None:
        value *= tl.load(norm + at, mask=at < size, other=0.0)
    return value


@triton.jit
def _rank_key(value: tl.tensor) -> tl.tensor:
    """Integers from 0 to 2^32 - 1 in the order of the float32 scores, with NaN below all others and -0 equal to +0."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    return tl.where(value == value, key, 0)


@triton.jit
def _topk(
    score: tl.tensor,
    norm: tl.tensor,
    indices: tl.tensor,
    mask: tl.tensor,
    size: tl.tensor,
    k: tl.tensor,
    score_stride: tl.tensor,
    ABS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    score += row * score_stride
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
        if mask is not None:
            tl.store(mask + row * size + at, kept, mask=at < size)
        found += tl.sum(kept.to(tl.int32), 0)
        tied_before += tl.sum(tied, 0)


@triton.jit
def _compact(
    score: tl.tensor,
    thresholds: tl.tensor,
    indices: tl.tensor,
    counts: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    score_stride: tl.tensor,
    threshold_stride: tl.tensor,
    fill: tl.tensor,
    ABS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    score += row * score_stride
    threshold = tl.load(thresholds + row * threshold_stride).to(tl.float32)
    found = 0
    for first in range(0, size, CHUNK):
        at = first + tl.arange(0, CHUNK)
        kept = (at < size) & (_load_score(score, None, at, size, ABS) > threshold)
        rank = found + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(indices + row * width + rank, at, mask=kept & (rank < width))
        found += tl.sum(kept.to(tl.int32), 0)
    for first in range(0, width, CHUNK):
        at = first + tl.arange(0, CHUNK)
        tl.store(indices + row * width + at, fill, mask=(at >= found) & (at < width))
    tl.store(counts + row, found)


@triton.jit
def _statistics(
    score: tl.tensor,
    thresholds: tl.tensor,
    size: tl.tensor,
    score_stride: tl.tensor,
    deviations: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    score += row * score_stride
    total = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, size, CHUNK):
        at = first + tl.arange(0, CHUNK)
        total += tl.load(score + at, mask=at < size, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / size
    squares = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, size, CHUNK):
        at = first + tl.arange(0, CHUNK)
        off = tl.load(score + at, mask=at < size, other=0.0).to(tl.float32) - mean
        squares += tl.where(at < size, off * off, 0.0)
    std = tl.sqrt_rn(tl.sum(squares, 0) / size)
    tl.store(thresholds + row, mean + std * deviations)
