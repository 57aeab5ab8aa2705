"""Triton twin of the linear with groups in 4 bits: a program decodes a row and multiplies it with all tokens."""
# mypy: disable-error-code="import-untyped, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from .triton_checks import check_groups
from .triton_tiles import load_x, token_tile

_COLUMNS = 256  # weights decoded at a time
_COLUMNS_MANY = 64  # the same with a tile of tokens, whose products all stay in registers


def packed_groups(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    columns: Tensor,
    row_offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """As `reference.packed_groups`."""
    check_groups(codes, columns, row_offsets, x.shape[1])
    rows = len(row_offsets) - 1
    out = x.new_empty(x.shape[0], rows)
    if out.numel():
        tile = token_tile(x.shape[0])
        parts = (part.contiguous() for part in (codes, scales, zeros, columns, row_offsets))
        _packed_groups[(rows,)](
            x,
            *parts,
            None if bias is None else bias.contiguous(),
            out,
            x.shape[0],
            rows,
            x.shape[1],
            2 * codes.shape[1],
            COLUMNS=_COLUMNS if tile == 1 else _COLUMNS_MANY,
            TOKENS=tile,
        )
    return out


def unpack_group_rows(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    columns: Tensor,
    row_offsets: Tensor,
    cols: int,
    start: int,
    stop: int,
) -> Tensor:
    """As `reference.unpack_group_rows`."""
    check_groups(codes, columns, row_offsets, cols)
    out = scales.new_zeros(stop - start, cols)
    if out.numel():
        parts = (part.contiguous() for part in (codes, scales, zeros, columns, row_offsets))
        _unpack_groups[(stop - start,)](*parts, out, start, cols, 2 * codes.shape[1], COLUMNS=_COLUMNS)
    return out


@triton.jit
def _group_tile(
    codes: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    groups: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    place: tl.tensor,
    size: tl.tensor,
) -> tl.tensor:
    """The groups ``start`` to ``stop`` laid side by side, at ``place``: weights, columns, whether inside."""
    group = start + place // size
    inside = group < stop
    at = place % size
    code = tl.load(codes + group * (size // 2) + at // 2, mask=inside, other=0).to(tl.int32)
    number = ((code >> (at % 2 * 4)) & 15).to(tl.float32)
    zero = tl.load(zeros + group, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales + group, mask=inside, other=0.0)
    weight = ((number - zero) * scale.to(tl.float32)).to(scale.dtype)
    column = tl.load(groups + group, mask=inside, other=0).to(tl.int64) * size + at
    return weight, column, inside


@triton.jit
def _packed_groups(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    groups: tl.tensor,
    offsets: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    size: tl.tensor,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(offsets + row).to(tl.int64), tl.load(offsets + row + 1).to(tl.int64)
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for first in range(0, (stop - start) * size, COLUMNS):
        place = first + tl.arange(0, COLUMNS)
        weight, column, inside = _group_tile(codes, scales, zeros, groups, start, stop, place, size)
        part = load_x(x, column, inside, tokens, columns, TOKENS)
        total += part.to(tl.float32) * weight.to(tl.float32)[None, :]
    result = tl.sum(total, 1)
    if bias is not None:
        result += tl.load(bias + row).to(tl.float32)
    token = tl.arange(0, TOKENS).to(tl.int64)
    tl.store(out + token * rows + row, result, mask=token < tokens)


@triton.jit
def _unpack_groups(
    codes: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    groups: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    first_row: tl.tensor,
    columns: tl.tensor,
    size: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    offsets += first_row + row
    start, stop = tl.load(offsets).to(tl.int64), tl.load(offsets + 1).to(tl.int64)
    for first in range(0, (stop - start) * size, COLUMNS):
        place = first + tl.arange(0, COLUMNS)
        weight, column, inside = _group_tile(codes, scales, zeros, groups, start, stop, place, size)
        tl.store(out + row * columns + column, weight, mask=inside)
