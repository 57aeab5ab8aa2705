"""Decode attention in Triton: the list of keys is cut into splits that run side by side, then their results merge."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from .problem import Problem

_PROGRAMS, _MOST_SPLITS, _BLOCK = 264, 64, 64  # two programs for each multiprocessor of a large GPU


def forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """``(out [B, H, Tq, Dv], lse [B, H, Tq] float32)``; a cache whose last stride is 1 is read where it lies."""
    if dispatch.interprets_triton() and query.dtype == torch.bfloat16:  # whose products take bfloat16 for integers
        out, lse = forward(query.float(), key.float(), value.float(), problem)
        return out.to(query.dtype), lse
    batch, heads, queries, dim = query.shape
    _, kv_heads, keys, value_dim = value.shape
    query = query.contiguous()
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    pages, lengths, starts, padding = problem.pages, problem.lengths, problem.starts, problem.padding
    lengths, starts = (None if x is None else x.contiguous() for x in (lengths, starts))
    listed, by_row, by_head = keys, 0, 0
    if pages is not None:
        listed = pages.shape[2] * problem.page_size
        pages = pages.expand(batch, kv_heads, -1)
        pages = pages if pages.stride(-1) == 1 else pages.contiguous()
        by_row, by_head = pages.stride()[:2]
    owners, rows = batch * kv_heads, heads // kv_heads * queries
    out = query.new_empty(batch, heads, queries, value_dim)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    if not out.numel():
        return out, lse
    block_rows = min(max(16, triton.next_power_of_2(rows)), 64)
    row_blocks = triton.cdiv(rows, block_rows)
    splits = max(1, min(triton.cdiv(_PROGRAMS, owners * row_blocks), triton.cdiv(listed, 2 * _BLOCK), _MOST_SPLITS))
    steps = triton.cdiv(triton.cdiv(listed, splits), _BLOCK)
    part_out = query.new_empty(owners, splits, rows, value_dim, dtype=torch.float32)
    part_lse = query.new_empty(owners, splits, rows, dtype=torch.float32)
    width = triton.next_power_of_2(value_dim)
    _attend[(owners, row_blocks, splits)](
        *(query, key, value, pages, lengths, starts, None if padding is None else padding.contiguous()),
        *(part_out, part_lse),
        *(kv_heads, rows, queries, keys, dim, value_dim, listed, problem.page_size, by_row, by_head),
        *(*key.stride()[:3], *value.stride()[:3]),
        *(problem.window or 0, problem.scale, problem.softcap or 0.0, steps),
        HAS_PAGES=pages is not None,
        HAS_LENGTHS=lengths is not None,
        HAS_STARTS=starts is not None,
        HAS_PADDING=padding is not None,
        HAS_SOFTCAP=problem.softcap is not None,
        HAS_WINDOW=problem.window is not None,
        ROWS=block_rows,
        KEYS=_BLOCK,
        DIM=max(16, triton.next_power_of_2(dim)),
        WIDTH=max(16, width),
    )
    _merge[(owners * rows,)](
        *(part_out, part_lse, out, lse, rows, splits, value_dim),
        SPLITS=triton.next_power_of_2(splits),
        WIDTH=width,
    )
    return out, lse


@triton.jit
def _attend(
    query,
    key,
    value,
    pages,
    lengths,
    starts,
    padding,
    part_out,
    part_lse,
    kv_heads,
    rows,
    queries,
    keys,
    dim,
    value_dim,
    listed,
    page_size,
    page_batch,
    page_head,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    window,
    scale,
    softcap,
    steps,
    HAS_PAGES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A block of the queries of one KV head against one split of its list."""
    owner = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    batch = owner // kv_heads
    head = owner % kv_heads
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM)
    dv = tl.arange(0, WIDTH)
    length = owner * 0 + keys
    start = owner * 0
    if HAS_STARTS:
        start = tl.load(starts + owner)
        length -= start
    if HAS_LENGTHS:
        length = tl.load(lengths + owner)
    stands = length - queries + row % queries
    q_mask = (row < rows)[:, None] & (d < dim)[None, :]
    q = tl.load(query + (owner * rows + row)[:, None] * dim + d[None, :], mask=q_mask, other=0.0)
    key += batch * key_batch + head * key_head + start * key_row
    value += batch * value_batch + head * value_head + start * value_row
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for step in range(0, steps):
        slot = (split * steps + step) * KEYS + tl.arange(0, KEYS)
        kept = slot < listed
        at = slot.to(tl.int64)
        if HAS_PAGES:
            entry = pages + batch * page_batch + head * page_head + slot // page_size
            page = tl.load(entry, mask=kept, other=-1).to(tl.int64)
            kept = kept & (page >= 0)
            at = page * page_size + slot % page_size
        kept = kept & (at < length)
        if HAS_WINDOW:
            kept = kept & (at > length - queries - window)
        if HAS_PADDING:
            kept = kept & (tl.load(padding + batch * keys + start + at, mask=kept, other=0) != 0)
        k = tl.load(key + at[:, None] * key_row + d[None, :], mask=kept[:, None] & (d < dim)[None, :], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            t = tl.exp(-2 * tl.abs(logits / softcap))
            logits = tl.where(logits < 0, -softcap, softcap) * (1 - t) / (1 + t)
        seen = kept[None, :] & (at[None, :] <= stands[:, None])
        if HAS_WINDOW:
            seen = seen & (at[None, :] > stands[:, None] - window)
        logits = tl.where(seen, logits, float("-inf"))
        top = tl.maximum(most, tl.max(logits, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp(logits - shift[:, None])
        factor = tl.exp(most - shift)
        total = total * factor + tl.sum(weights, 1)
        v_mask = kept[:, None] & (dv < value_dim)[None, :]
        v = tl.load(value + at[:, None] * value_row + dv[None, :], mask=v_mask, other=0.0)
        sums = sums * factor[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = top
    some = tl.where(total == 0, 1.0, total)
    part = (owner * tl.num_programs(2) + split) * rows + row
    tl.store(part_lse + part, tl.where(total == 0, float("-inf"), most + tl.log(some)), mask=row < rows)
    out_mask = (row < rows)[:, None] & (dv < value_dim)[None, :]
    tl.store(part_out + part[:, None] * value_dim + dv[None, :], sums / some[:, None], mask=out_mask)


@triton.jit
def _merge(part_out, part_lse, out, lse, rows, splits, value_dim, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """One row of the result from its splits."""
    index = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    dv = tl.arange(0, WIDTH)
    part = (index // rows * splits + split) * rows + index % rows
    each = tl.load(part_lse + part, mask=split < splits, other=float("-inf"))
    most = tl.max(each, 0)
    weights = tl.exp(each - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(weights, 0)
    some = tl.where(total == 0, 1.0, total)
    mask = (split < splits)[:, None] & (dv < value_dim)[None, :]
    sums = tl.sum(
        tl.load(part_out + part[:, None] * value_dim + dv[None, :], mask=mask, other=0.0) * weights[:, None], 0
    )
    tl.store(out + index * value_dim + dv, (sums / some).to(out.dtype.element_ty), mask=dv < value_dim)
    tl.store(lse + index, tl.where(total == 0, float("-inf"), most + tl.log(some)))
