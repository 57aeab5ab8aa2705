"""Triton twins of the packed linears: tiles of the weight are decoded in registers and multiplied at once."""
# mypy: disable-error-code="import-untyped, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from .triton_checks import check_bits, check_blocks
from .triton_tiles import finish, load_x, multiplies_wide, multiply, token_tile

_ROWS, _COLUMNS = 16, 128  # of a tile of the weight; a matrix product takes 16 rows at least


def packed_bits(x: Tensor, values: Tensor, bits: Tensor, row_offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """As `reference.packed_bits`."""
    check_bits(values, bits, row_offsets, x.shape[1])
    (tokens, columns), rows = x.shape, bits.shape[0]
    out = x.new_empty(tokens, rows)
    if out.numel():
        _packed_bits[(triton.cdiv(rows, _ROWS),)](
            x,
            values.contiguous(),
            bits.contiguous(),
            _contiguous(row_offsets),
            _contiguous(bias),
            out,
            tokens,
            rows,
            columns,
            values.numel() // rows,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            TOKENS=token_tile(tokens),
            WIDE=multiplies_wide(x),
        )
    return out


def unpack_bit_rows(
    values: Tensor, bits: Tensor, row_offsets: Tensor | None, cols: int, start: int, stop: int
) -> Tensor:
    """As `reference.unpack_bit_rows`."""
    check_bits(values, bits, row_offsets, cols)
    out = values.new_empty(stop - start, cols)
    if out.numel():
        _unpack_bits[(triton.cdiv(stop - start, _ROWS),)](
            values.contiguous(),
            bits.contiguous(),
            _contiguous(row_offsets),
            out,
            start,
            stop,
            cols,
            values.numel() // bits.shape[0],
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
    return out


def packed_blocks(x: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    """As `reference.packed_blocks`."""
    check_blocks(values, columns, row_offsets, x.shape[1])
    block_rows, (_, height, width) = len(row_offsets) - 1, values.shape
    out = x.new_empty(x.shape[0], block_rows * height)
    if out.numel():
        tile = min(64, max(16, triton.next_power_of_2(height)))
        _packed_blocks[(block_rows, triton.cdiv(height, tile))](
            x,
            values.contiguous(),
            columns.contiguous(),
            row_offsets.contiguous(),
            _contiguous(bias),
            out,
            x.shape[0],
            out.shape[1],
            x.shape[1],
            height,
            width,
            ROWS=tile,
            COLUMNS=_COLUMNS,
            TOKENS=token_tile(x.shape[0]),
            WIDE=multiplies_wide(x),
        )
    return out


def unpack_block_rows(values: Tensor, columns: Tensor, row_offsets: Tensor, cols: int, start: int, stop: int) -> Tensor:
    """As `reference.unpack_block_rows`."""
    check_blocks(values, columns, row_offsets, cols)
    _, height, width = values.shape
    out = values.new_zeros((stop - start) * height, cols)
    if out.numel():
        tile = min(64, triton.next_power_of_2(height))
        _unpack_blocks[(stop - start, triton.cdiv(height, tile))](
            values.contiguous(),
            columns.contiguous(),
            row_offsets.contiguous(),
            out,
            start,
            cols,
            height,
            width,
            ROWS=tile,
            COLUMNS=_COLUMNS,
        )
    return out


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@triton.jit
def _row_start(offsets: tl.tensor, row: tl.tensor, inside: tl.tensor, per_row: tl.tensor) -> tl.tensor:
    return row * per_row if offsets is None else tl.load(offsets + row, mask=inside, other=0).to(tl.int64)


@triton.jit
def _bit_tile(bits: tl.tensor, row: tl.tensor, column: tl.tensor, inside: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """The bits of rows and columns, int32, 0 outside."""
    at = row[:, None] * ((columns + 7) // 8) + (column // 8)[None, :]
    byte = tl.load(bits + at, mask=inside[:, None] & (column < columns)[None, :], other=0).to(tl.int32)
    return (byte >> (column % 8)[None, :]) & tl.where(column < columns, 1, 0)[None, :]


@triton.jit
def _value_tile(values: tl.tensor, bit: tl.tensor, before: tl.tensor) -> tl.tensor:
    """The weights behind the bits; ``before [rows]`` counts the values stored ahead of the tile."""
    return tl.load(values + before[:, None] + tl.cumsum(bit, 1) - 1, mask=bit > 0, other=0.0)


@triton.jit
def _packed_bits(
    x: tl.tensor,
    values: tl.tensor,
    bits: tl.tensor,
    offsets: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    per_row: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    before = _row_start(offsets, row, row < rows, per_row)
    total = tl.zeros((ROWS, COLUMNS if TOKENS == 1 else TOKENS), tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        bit = _bit_tile(bits, row, column, row < rows, columns)
        weight = _value_tile(values, bit, before)
        before += tl.sum(bit, 1)
        total = multiply(total, weight, load_x(x, column, column < columns, tokens, columns, TOKENS), TOKENS, WIDE)
    finish(total, out, bias, None, row, row < rows, rows, tokens, TOKENS)


@triton.jit
def _unpack_bits(
    values: tl.tensor,
    bits: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    columns: tl.tensor,
    per_row: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = start + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    before = _row_start(offsets, row, row < stop, per_row)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        bit = _bit_tile(bits, row, column, row < stop, columns)
        weight = _value_tile(values, bit, before)
        before += tl.sum(bit, 1)
        inside = (row < stop)[:, None] & (column < columns)[None, :]
        tl.store(out + (row - start)[:, None] * columns + column[None, :], weight, mask=inside)


@triton.jit
def _block_tile(
    values: tl.tensor,
    blocks: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    place: tl.tensor,
    row: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
) -> tl.tensor:
    """Rows of the blocks ``start`` to ``stop`` laid side by side, at ``place``: weights, columns, whether inside."""
    block = start + place // width
    inside = block < stop
    column = tl.load(blocks + block, mask=inside, other=0).to(tl.int64) * width + place % width
    at = (block * height)[None, :] * width + row[:, None] * width + (place % width)[None, :]
    return tl.load(values + at, mask=inside[None, :] & (row < height)[:, None], other=0.0), column, inside


@triton.jit
def _packed_blocks(
    x: tl.tensor,
    values: tl.tensor,
    blocks: tl.tensor,
    offsets: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    block_row = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    start, stop = tl.load(offsets + block_row).to(tl.int64), tl.load(offsets + block_row + 1).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS if TOKENS == 1 else TOKENS), tl.float32)
    for first in range(0, (stop - start) * width, COLUMNS):
        place = first + tl.arange(0, COLUMNS)
        weight, column, inside = _block_tile(values, blocks, start, stop, place, row, height, width)
        total = multiply(total, weight, load_x(x, column, inside, tokens, columns, TOKENS), TOKENS, WIDE)
    finish(total, out, bias, None, block_row * height + row, row < height, rows, tokens, TOKENS)


@triton.jit
def _unpack_blocks(
    values: tl.tensor,
    blocks: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    first_row: tl.tensor,
    columns: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    block_row = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    offsets += first_row + block_row
    start, stop = tl.load(offsets).to(tl.int64), tl.load(offsets + 1).to(tl.int64)
    for first in range(0, (stop - start) * width, COLUMNS):
        place = first + tl.arange(0, COLUMNS)
        weight, column, inside = _block_tile(values, blocks, start, stop, place, row, height, width)
        at = (block_row * height + row)[:, None] * columns + column[None, :]
        tl.store(out + at, weight, mask=inside[None, :] & (row < height)[:, None])
