"""Triton twin: one program per output row and block of pixels, over the stored weights of the row."""
# mypy: disable-error-code="import-untyped, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES = 16  # input channels that a program holds at a time


@triton.jit
def _spmm(
    values: tl.tensor,
    columns: tl.tensor,
    offsets: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    pixels: tl.tensor,
    batch_stride: tl.tensor,
    channel_stride: tl.tensor,
    ENTRIES: tl.constexpr,
    PIXELS: tl.constexpr,
) -> None:
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(1).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    start, stop = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = tl.zeros((PIXELS,), tl.float32)
    for first in range(start, stop, ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        value = tl.load(values + at, mask=at < stop, other=0.0).to(tl.float32)
        channel = tl.load(columns + at, mask=at < stop, other=0).to(tl.int64)
        used = (at < stop)[:, None] & (pixel < pixels)[None, :]
        part = tl.load(
            x + batch * batch_stride + channel[:, None] * channel_stride + pixel[None, :], mask=used, other=0.0
        )
        total += tl.sum(value[:, None] * part.to(tl.float32), 0)
    tl.store(out + (batch * rows + row) * pixels + pixel, total, mask=pixel < pixels)
