"""Triton twins: one program per token and chunk of columns; for a table's gradient, per atom over sorted entries."""
# mypy: disable-error-code="import-untyped, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_SLOTS = 16  # rows of the table that a program holds at a time


def gather_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """As `reference.gather_sum`."""
    (tokens, slots), width = values.shape, table.shape[1]
    values, indices, table = values.contiguous(), indices.contiguous(), _rows(table)
    out = values.new_empty(tokens, width)
    if out.numel():
        block = _width_block(width)
        _gather_sum[(tokens, triton.cdiv(width, block))](
            values, indices, table, out, slots, width, table.stride(0), SLOTS=_SLOTS, WIDTH=block
        )
    return out


def gather_dot(x: Tensor, indices: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """As `reference.gather_dot`."""
    (tokens, slots), width = indices.shape, table.shape[1]
    x, indices, table = _rows(x), indices.contiguous(), _rows(table)
    out = x.new_empty(tokens, slots)
    if out.numel():
        _gather_dot[(tokens, triton.cdiv(slots, _SLOTS))](
            x,
            indices,
            table,
            None if bias is None else bias.contiguous(),
            out,
            slots,
            width,
            x.stride(0),
            table.stride(0),
            SLOTS=_SLOTS,
            WIDTH=_width_block(width),
        )
    return out


def scatter_outer(values: Tensor, indices: Tensor, x: Tensor, size: int) -> Tensor:
    """As `reference.scatter_outer`."""
    slots, width = values.shape[1], x.shape[1]
    values, x = values.contiguous(), _rows(x)
    out = x.new_empty(size, width)
    if out.numel():
        # Stable: the entries of an atom are summed in the order of the tokens, every time.
        atoms, entries = indices.flatten().sort(stable=True)
        starts = torch.searchsorted(atoms, torch.arange(size + 1, device=x.device, dtype=atoms.dtype))
        block = _width_block(width)
        _scatter_outer[(size, triton.cdiv(width, block))](
            values, entries, starts, x, out, slots, width, x.stride(0), ENTRIES=_SLOTS, WIDTH=block
        )
    return out


def gather_sum_backward(values: Tensor, indices: Tensor, table: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.gather_sum_backward`; two passes, since one goes by tokens and the other by atoms."""
    return gather_dot(grad, indices, table, None), scatter_outer(values, indices, grad, table.shape[0])


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _width_block(width: int) -> int:
    return min(256, int(triton.next_power_of_2(max(width, 1))))


@triton.jit
def _gather_sum(
    values: tl.tensor,
    indices: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    slots: tl.tensor,
    width: tl.tensor,
    table_stride: tl.tensor,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        value = tl.load(values + token * slots + slot, mask=slot < slots, other=0.0).to(tl.float32)
        atom = tl.load(indices + token * slots + slot, mask=slot < slots, other=0).to(tl.int64)
        used = (value != 0)[:, None] & (column < width)[None, :]
        rows = tl.load(table + atom[:, None] * table_stride + column[None, :], mask=used, other=0.0)
        total += tl.sum(value[:, None] * rows.to(tl.float32), 0)
    tl.store(out + token * width + column, total, mask=column < width)


@triton.jit
def _gather_dot(
    x: tl.tensor,
    indices: tl.tensor,
    table: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    slots: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    table_stride: tl.tensor,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    atom = tl.load(indices + token * slots + slot, mask=slot < slots, other=0).to(tl.int64)
    total = tl.zeros((SLOTS,), tl.float32)
    for first in range(0, width, WIDTH):
        column = first + tl.arange(0, WIDTH)
        part = tl.load(x + token * x_stride + column, mask=column < width, other=0.0).to(tl.float32)
        used = (slot < slots)[:, None] & (column < width)[None, :]
        rows = tl.load(table + atom[:, None] * table_stride + column[None, :], mask=used, other=0.0)
        total += tl.sum(part[None, :] * rows.to(tl.float32), 1)
    if bias is not None:
        total += tl.load(bias + atom, mask=slot < slots, other=0.0).to(tl.float32)
    tl.store(out + token * slots + slot, total, mask=slot < slots)


@triton.jit
def _scatter_outer(
    values: tl.tensor,
    entries: tl.tensor,
    starts: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    slots: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    atom = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    start, stop = tl.load(starts + atom), tl.load(starts + atom + 1)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(start, stop, ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        entry = tl.load(entries + at, mask=at < stop, other=0)
        value = tl.load(values + entry, mask=at < stop, other=0.0).to(tl.float32)
        used = (value != 0)[:, None] & (column < width)[None, :]
        rows = tl.load(x + (entry // slots)[:, None] * x_stride + column[None, :], mask=used, other=0.0)
        total += tl.sum(value[:, None] * rows.to(tl.float32), 0)
    tl.store(out + atom * width + column, total, mask=column < width)
