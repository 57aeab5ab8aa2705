"""Triton twins: one program per output row and block of pixels, over the stored weights of the row."""
# mypy: disable-error-code="import-untyped, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES = 16  # stored weights that a program holds at a time
_PIXELS = 128


def spmm(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """As `reference.spmm`."""
    (batch, size, pixels), rows = x.shape, len(row_offsets) - 1
    out = x.new_empty(batch, rows, pixels)
    if out.numel():
        block = _pixel_block(pixels)
        _spmm[(rows * batch, triton.cdiv(pixels, block))](
            values.contiguous(),
            columns.contiguous(),
            row_offsets.contiguous(),
            x.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            rows,
            size,
            pixels,
            ENTRIES=_ENTRIES,
            PIXELS=block,
        )
    return out


def spmm_transposed(values: Tensor, columns: Tensor, row_offsets: Tensor, x: Tensor, size: int) -> Tensor:
    """As `reference.spmm_transposed`; the entries are put in the order of their columns first."""
    columns, order = columns.sort(stable=True)
    starts = torch.searchsorted(columns, torch.arange(size + 1, device=x.device, dtype=torch.int32))
    return spmm(values[order], _entry_rows(row_offsets, len(order))[order], starts, x, None)


def sddmm(columns: Tensor, row_offsets: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """As `reference.sddmm`."""
    batch, size, pixels = x.shape
    out = x.new_empty(len(columns))
    if out.numel():
        _sddmm[(triton.cdiv(len(columns), _ENTRIES),)](
            _entry_rows(row_offsets, len(columns)),
            columns.contiguous(),
            grad.contiguous(),
            x.contiguous(),
            out,
            len(columns),
            batch,
            grad.shape[1],
            size,
            pixels,
            ENTRIES=_ENTRIES,
            PIXELS=_pixel_block(pixels),
        )
    return out


def _entry_rows(row_offsets: Tensor, entries: int) -> Tensor:
    row = torch.arange(len(row_offsets) - 1, device=row_offsets.device)
    return row.repeat_interleave(row_offsets.diff().long(), output_size=entries)


def _pixel_block(pixels: int) -> int:
    return min(_PIXELS, int(triton.next_power_of_2(max(pixels, 1))))


@triton.jit
def _spmm(
    values: tl.tensor,
    columns: tl.tensor,
    offsets: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    pixels: tl.tensor,
    ENTRIES: tl.constexpr,
    PIXELS: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    row, x = program % rows, x + program // rows * size * pixels
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    start, stop = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = tl.zeros((PIXELS,), tl.float32)
    for first in range(start, stop, ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        value = tl.load(values + at, mask=at < stop, other=0.0).to(tl.float32)
        channel = tl.load(columns + at, mask=at < stop, other=0).to(tl.int64)
        used = (at < stop)[:, None] & (pixel < pixels)[None, :]
        part = tl.load(x + channel[:, None] * pixels + pixel[None, :], mask=used, other=0.0)
        total += tl.sum(value[:, None] * part.to(tl.float32), 0)
    if bias is not None:
        total += tl.load(bias + row).to(tl.float32)
    tl.store(out + program * pixels + pixel, total, mask=pixel < pixels)


@triton.jit
def _sddmm(
    rows_of: tl.tensor,
    columns: tl.tensor,
    grad: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    entries: tl.tensor,
    batch: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    pixels: tl.tensor,
    ENTRIES: tl.constexpr,
    PIXELS: tl.constexpr,
) -> None:
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < entries
    row = tl.load(rows_of + entry, mask=inside, other=0).to(tl.int64)
    channel = tl.load(columns + entry, mask=inside, other=0).to(tl.int64)
    total = tl.zeros((ENTRIES, PIXELS), tl.float32)
    for _ in range(0, batch):
        for first in range(0, pixels, PIXELS):
            pixel = first + tl.arange(0, PIXELS)
            used = inside[:, None] & (pixel < pixels)[None, :]
            left = tl.load(grad + row[:, None] * pixels + pixel[None, :], mask=used, other=0.0).to(tl.float32)
            right = tl.load(x + channel[:, None] * pixels + pixel[None, :], mask=used, other=0.0).to(tl.float32)
            total += left * right
        row += rows
        channel += size
    tl.store(out + entry, tl.sum(total, 1), mask=inside)
