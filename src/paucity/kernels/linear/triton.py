"""Triton twins of the sparse and packed linears.

A dropped input or output is a masked load: its weights, which lie side by side, are not fetched. Nothing is counted,
since a count would have to come back from the GPU before the product starts; ``max_kept`` is therefore not used, and a
product with all inputs kept costs what the dense one does.
"""
# mypy: disable-error-code="import-untyped, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..select.triton import topk_mask
from .triton_groups import packed_groups, unpack_group_rows
from .triton_packed import packed_bits, packed_blocks, unpack_bit_rows, unpack_block_rows
from .triton_tiles import finish, load_x, multiplies_wide, multiply, token_tile

__all__ = [
    "masked_input",
    "packed_bits",
    "packed_blocks",
    "packed_groups",
    "sparse_input",
    "sparse_output",
    "unpack_bit_rows",
    "unpack_block_rows",
    "unpack_group_rows",
]

_INPUTS, _ROWS = 32, 128  # of a tile of an input-major weight
_PROGRAMS = 1024  # a few for each multiprocessor: the inputs are divided until there are as many


def sparse_input(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    threshold: float | None,
    k: int | None,
    max_kept: int,
) -> tuple[Tensor | None, Tensor]:
    """As `reference.sparse_input`; a threshold is applied by the product itself."""
    norm = None if norm is None else norm.detach().float().contiguous()
    if threshold is None:
        mask = topk_mask(x, k or 0, True, norm)
        return masked_input(x, weight, mask, bias, max_kept), mask
    if norm is None:
        threshold = torch.tensor(threshold, dtype=x.dtype).item()
    mask = torch.empty_like(x, dtype=torch.bool)
    return _product(x, weight, mask, bias, norm, threshold), mask


def masked_input(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, max_kept: int) -> Tensor | None:
    """As `reference.masked_input`."""
    return _product(x, weight, mask, bias, None, None)


def sparse_output(x: Tensor, weight: Tensor, rows: Tensor, bias: Tensor | None, max_kept: int) -> Tensor | None:
    """As `reference.sparse_output`."""
    (tokens, columns), size = x.shape, weight.shape[0]
    out = x.new_empty(tokens, size)
    if out.numel():
        _some_rows[(triton.cdiv(size, 16),)](
            x,
            weight,
            rows,
            None if bias is None else bias.contiguous(),
            out,
            tokens,
            size,
            columns,
            weight.stride(0),
            ROWS=16,
            COLUMNS=128,
            TOKENS=token_tile(tokens),
            WIDE=multiplies_wide(x),
        )
    return out


def _product(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, norm: Tensor | None, threshold: float | None
) -> Tensor:
    """Over the inputs in ``mask``, which is written where a threshold is given and read otherwise."""
    (tokens, columns), rows = x.shape, weight.shape[0]
    chunks = triton.cdiv(rows, _ROWS)
    parts = max(1, min(_PROGRAMS // max(1, chunks), triton.cdiv(columns, 4 * _INPUTS)))
    partial = x.new_empty(parts, tokens, rows, dtype=torch.float32)
    out = x.new_empty(tokens, rows)
    if out.numel():
        _some_inputs[(chunks, parts)](
            x,
            weight,
            mask,
            norm,
            0.0 if threshold is None else threshold,
            partial,
            tokens,
            rows,
            columns,
            weight.stride(1),
            triton.cdiv(triton.cdiv(columns, parts), _INPUTS) * _INPUTS,
            SELECT=threshold is not None,
            INPUTS=_INPUTS,
            ROWS=_ROWS,
            TOKENS=token_tile(tokens),
            WIDE=multiplies_wide(x),
        )
        _add_parts[(tokens, triton.cdiv(rows, 1024))](
            partial, None if bias is None else bias.contiguous(), out, tokens, rows, parts, ROWS=1024
        )
    return out


@triton.jit
def _some_inputs(
    x: tl.tensor,
    weight: tl.tensor,
    mask: tl.tensor,
    norm: tl.tensor,
    threshold: tl.tensor,
    partial: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    weight_stride: tl.tensor,
    share: tl.tensor,
    SELECT: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    part = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS).to(tl.int64)
    total = tl.zeros((INPUTS if TOKENS == 1 else TOKENS, ROWS), tl.float32)
    # All programs of a part find the same mask; the first one writes it.
    recorded = tl.where(tl.program_id(0) == 0, columns, 0)
    for first in range(part * share, tl.minimum(part * share + share, columns), INPUTS):
        column = first + tl.arange(0, INPUTS)
        at = token[None, :] * columns + column[:, None]
        inside = (token < tokens)[None, :] & (column < columns)[:, None]
        value = tl.load(x + at, mask=inside, other=0.0)
        if SELECT:
            score = tl.abs(value.to(tl.float32))
            if norm is not None:
                score *= tl.load(norm + column, mask=column < columns, other=0.0)[:, None]
            kept = inside & (score > threshold)
            tl.store(mask + at, kept, mask=inside & (column < recorded)[:, None])
        else:
            kept = tl.load(mask + at, mask=inside, other=0) != 0
        used = tl.max(kept.to(tl.int32), 1) > 0
        tile = tl.load(
            weight + column[:, None] * weight_stride + row[None, :],
            mask=used[:, None] & (row < rows)[None, :],
            other=0.0,
        )
        value = tl.where(kept, value, 0.0)
        if TOKENS == 1:
            total += value.to(tl.float32) * tile.to(tl.float32)
        elif WIDE:
            total = tl.dot(tl.trans(value.to(tl.float32)), tile.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(tl.trans(value), tile, total, input_precision="ieee")
    if TOKENS == 1:
        total = tl.sum(total, 0)[None, :]
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(partial + (part * tokens + token)[:, None] * rows + row[None, :], total, mask=inside)


@triton.jit
def _add_parts(
    partial: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    parts: tl.tensor,
    ROWS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for part in range(0, parts):
        total += tl.load(partial + (part * tokens + token) * rows + row, mask=row < rows, other=0.0)
    if bias is not None:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + token * rows + row, total, mask=row < rows)


@triton.jit
def _some_rows(
    x: tl.tensor,
    weight: tl.tensor,
    kept: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    weight_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS).to(tl.int64)
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    used = tl.max(tl.load(kept + token[None, :] * rows + row[:, None], mask=inside, other=0).to(tl.int32), 1)
    # Where no row of the tile is kept, there is nothing to walk over.
    stop = tl.where(tl.max(used, 0) > 0, columns, 0)
    total = tl.zeros((ROWS, COLUMNS if TOKENS == 1 else TOKENS), tl.float32)
    for first in range(0, stop, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        valid = (used > 0)[:, None] & (column < columns)[None, :]
        tile = tl.load(weight + row[:, None] * weight_stride + column[None, :], mask=valid, other=0.0)
        total = multiply(total, tile, load_x(x, column, column < columns, tokens, columns, TOKENS), TOKENS, WIDE)
    finish(total, out, bias, kept, row, row < rows, rows, tokens, TOKENS)
