"""The Triton kernels of sparse attention backward.

``P = exp(logit - lse)`` is computed again, and ``dS = P * (dO v - delta)`` with ``delta = rowsum(dO * O) - dlse``. One
kernel runs over queries for ``dQ`` and, where asked for, writes ``dS``, the gradient of the bias. Another runs over
keys for ``dK`` and ``dV`` with transposed tiles. Where keys are single, a program of it writes rows of its own for each
block of queries, and a third kernel sums for every key the rows that are its. Nothing is added atomically, so results
are the same from run to run.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from .triton_forward import HIDDEN, LOG2E, add_bias, in_reach, keep_elements, load_rows, sees, soften, store_rows


@triton.jit
def _add_dq(
    dq, q, grad, lse2, delta, row, at, row_ok, first, last, col, ok, inner_row, inner_col, entry,
    key, value, padding, bias, elements, ds, k_strides, v_strides, bias_strides, kv_len, scale, softcap, window, near,
    CAUSAL: tl.constexpr, FAR: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dq`` with one tile of keys more."""
    ok = in_reach(col, ok, first, last, padding, window, near, CAUSAL, FAR)
    seen = sees(row_ok[:, None] & ok[None, :], at[:, None], col[None, :], window, near, CAUSAL, FAR)
    if elements is not None:
        seen = keep_elements(seen, elements, entry, inner_row[:, None], inner_col[None, :], Q_BLOCK, K_BLOCK)
    if bias is not None:
        added, seen = add_bias(seen, bias, row[:, None], col[None, :], bias_strides[2], bias_strides[3])
    if elements is not None or bias is not None:
        ok = tl.max(seen.to(tl.int32), 0) > 0
    k = load_rows(key, col, ok, k_strides[2], k_strides[3], D, BLOCK_D)
    v = load_rows(value, col, ok, v_strides[2], v_strides[3], DV, BLOCK_DV)
    logits, bent = soften(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap)
    if bias is not None:
        logits += added * LOG2E
    prob = tl.exp2(tl.where(seen, logits - lse2[:, None], HIDDEN))
    slope = prob * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    if ds is not None:
        tl.store(ds + row.to(tl.int64)[:, None] * kv_len + col[None, :], slope, mask=seen)
    if softcap is not None:
        slope *= 1.0 - bent * bent
    slope = tl.where(seen, slope, 0.0)
    return dq + tl.dot(slope.to(k.dtype), k, input_precision=PRECISION)


@triton.jit
def query_kernel(
    query, key, value, grad, lse, delta, g_strides, dq, ds,
    positions, counts, blocks, partial, elements, padding, bias,
    q_strides, k_strides, v_strides, bias_strides, list_strides, width,
    heads, group, list_heads, q_len, kv_len, scale, softcap, window, near,
    CAUSAL: tl.constexpr, RANGE: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dQ``; loops and grid are those of ``forward_kernel``. ``dq`` and ``ds`` are contiguous."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    kv_head, list_head = head // group, head * list_heads // heads
    q_subs: tl.constexpr = (Q_BLOCK + BLOCK_M - 1) // BLOCK_M
    k_subs: tl.constexpr = (K_BLOCK + BLOCK_N - 1) // BLOCK_N
    q_block = tile // q_subs
    inner_row = (tile % q_subs) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = q_block * Q_BLOCK + inner_row
    in_tile = (inner_row < Q_BLOCK) & (row < q_len)
    at = row + kv_len - q_len
    first = q_block * Q_BLOCK + (tile % q_subs) * BLOCK_M + kv_len - q_len
    last = (
        tl.minimum(q_block * Q_BLOCK + tl.minimum((tile % q_subs + 1) * BLOCK_M, Q_BLOCK), q_len) + kv_len - q_len - 1
    )

    query += batch * q_strides[0] + head * q_strides[1]
    key += batch * k_strides[0] + kv_head * k_strides[1]
    value += batch * v_strides[0] + kv_head * v_strides[1]
    grad += batch * g_strides[0] + head * g_strides[1]
    rows_before = (batch * heads + head) * q_len
    if padding is not None:
        padding += batch * kv_len
    if bias is not None:
        bias += batch * bias_strides[0] + head * bias_strides[1]
    if ds is not None:
        ds += rows_before * kv_len
    lse2 = tl.load(lse + rows_before + row, mask=in_tile, other=HIDDEN) * LOG2E
    row_ok = in_tile & (lse2 != HIDDEN)
    lse2 = tl.where(row_ok, lse2, 0.0)
    slope_mean = tl.load(delta + rows_before + row, mask=row_ok, other=0.0)
    q = load_rows(query, row, row_ok, q_strides[2], q_strides[3], D, BLOCK_D)
    g = load_rows(grad, row, row_ok, g_strides[2], g_strides[3], DV, BLOCK_DV).to(q.dtype)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    line = batch * list_strides[0] + list_head * list_strides[1] + q_block.to(tl.int64) * list_strides[2]
    if positions is not None:
        count = tl.load(counts + line)
        for start in range(width - count, width, BLOCK_N):
            slot = start + tl.arange(0, BLOCK_N)
            col = tl.load(positions + line * width + slot, mask=slot < width, other=-1)
            acc = _add_dq(
                acc, q, g, lse2, slope_mean, row, at, row_ok, first, last, col, (col >= 0) & (col < kv_len),
                inner_row, col, -1, key, value, padding, bias, None, ds, k_strides, v_strides, bias_strides, kv_len,
                scale, softcap, window, near, CAUSAL, RANGE, Q_BLOCK, K_BLOCK, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
    if RANGE or blocks is not None:
        if RANGE:
            begin = tl.maximum(first - near + 1, 0) // BLOCK_N
            stop = (last + BLOCK_N) // BLOCK_N
            reach = near
        else:
            begin = 0
            stop = tl.load(counts + line) * k_subs
            line *= width
            reach = window
        for step in range(begin, stop):
            k_block = step if RANGE else tl.load(blocks + line + step // k_subs)
            inner_col = step % k_subs * BLOCK_N + tl.arange(0, BLOCK_N)
            col = k_block * K_BLOCK + inner_col
            entry = -1
            if partial is not None:
                entry = tl.load(partial + line + k_block)
            acc = _add_dq(
                acc, q, g, lse2, slope_mean, row, at, row_ok, first, last, col, (inner_col < K_BLOCK) & (col < kv_len),
                inner_row, inner_col, entry, key, value, padding, bias, elements, ds, k_strides, v_strides,
                bias_strides, kv_len, scale, softcap, reach, near, CAUSAL, False, Q_BLOCK, K_BLOCK,
                D, DV, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
    store_rows(dq + rows_before * D, acc * scale, row, in_tile, D, 1, D, BLOCK_D)


@triton.jit
def key_kernel(
    query, key, value, grad, lse, delta, g_strides, dk, dv, owners, num_rows, skipped,
    positions, counts, blocks, partial, elements, padding, bias,
    q_strides, k_strides, v_strides, bias_strides, list_strides, width,
    heads, group, list_heads, q_len, kv_len, scale, softcap, window, near,
    CAUSAL: tl.constexpr, RANGE: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dK`` and ``dV`` ``[B, owners, num_rows, D]`` for tiles of keys, grid ``[tiles, B * owners]``.

    An owner stands for ``heads / owners`` heads that share keys. ``blocks`` and ``partial`` are transposed: the blocks
    of queries of each block of keys. With ``positions`` rows are their slots, ``width`` for each block of queries from
    number ``skipped`` on.
    """
    tile = tl.program_id(0)
    batch, owner = (tl.program_id(1) // owners).to(tl.int64), (tl.program_id(1) % owners).to(tl.int64)
    shared = heads // owners
    kv_head = owner * shared // group
    q_subs: tl.constexpr = (Q_BLOCK + BLOCK_M - 1) // BLOCK_M
    k_subs: tl.constexpr = (K_BLOCK + BLOCK_N - 1) // BLOCK_N
    far: tl.constexpr = RANGE and positions is not None
    inner_col = tl.arange(0, BLOCK_N)
    k_block, k_start = tile, tile * BLOCK_N
    if positions is not None:
        k_tiles = (width + BLOCK_N - 1) // BLOCK_N
        k_block = tile // k_tiles + skipped  # here of queries
        slot = tile % k_tiles * BLOCK_N + inner_col
        line = batch * list_strides[0] + owner * shared * list_heads // heads * list_strides[1]
        line += k_block * list_strides[2]
        col = tl.load(positions + line * width + slot, mask=slot < width, other=-1)
        ok, index, store_ok = (col >= 0) & (col < kv_len), tile // k_tiles * width + slot, slot < width
    else:
        if not RANGE:
            k_block = tile // k_subs
            inner_col += tile % k_subs * BLOCK_N
            k_start = k_block * K_BLOCK + tile % k_subs * BLOCK_N
        col = k_block * K_BLOCK + inner_col
        ok = (inner_col < K_BLOCK) & (col < kv_len)
        index, store_ok = col, ok
    if padding is not None:
        ok &= tl.load(padding + batch * kv_len + col, mask=ok, other=0) != 0
    k = load_rows(key + batch * k_strides[0] + kv_head * k_strides[1], col, ok, k_strides[2], k_strides[3], D, BLOCK_D)
    v = load_rows(
        value + batch * v_strides[0] + kv_head * v_strides[1], col, ok, v_strides[2], v_strides[3], DV, BLOCK_DV
    )
    reach = window
    if RANGE and positions is None:
        reach = near
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    for number in range(0, shared):
        head = owner * shared + number
        rows_before = (batch * heads + head) * q_len
        q_base = query + batch * q_strides[0] + head * q_strides[1]
        g_base = grad + batch * g_strides[0] + head * g_strides[1]
        line = batch * list_strides[0] + head * list_heads // heads * list_strides[1]
        line += k_block * list_strides[2]
        if positions is not None:
            begin = k_block * q_subs
            stop = begin + q_subs
        elif RANGE:
            begin = tl.maximum(k_start - (kv_len - q_len), 0) // BLOCK_M
            stop = tl.maximum(tl.minimum(k_start + BLOCK_N - 1 + near - (kv_len - q_len), q_len), 0)
            stop = (stop + BLOCK_M - 1) // BLOCK_M
        else:
            begin = 0
            stop = tl.load(counts + line) * q_subs
        for step in range(begin, stop):
            q_block = step // q_subs
            if blocks is not None:
                q_block = tl.load(blocks + line * width + q_block)
            inner_row = step % q_subs * BLOCK_M + tl.arange(0, BLOCK_M)
            row = q_block * Q_BLOCK + inner_row
            row_ok = (inner_row < Q_BLOCK) & (row < q_len)
            lse2 = tl.load(lse + rows_before + row, mask=row_ok, other=HIDDEN) * LOG2E
            row_ok &= lse2 != HIDDEN
            lse2 = tl.where(row_ok, lse2, 0.0)
            slope_mean = tl.load(delta + rows_before + row, mask=row_ok, other=0.0)
            q = load_rows(q_base, row, row_ok, q_strides[2], q_strides[3], D, BLOCK_D)
            g = load_rows(g_base, row, row_ok, g_strides[2], g_strides[3], DV, BLOCK_DV).to(q.dtype)
            at = (row + kv_len - q_len)[None, :]
            seen = sees(ok[:, None] & row_ok[None, :], at, col[:, None], reach, near, CAUSAL, far)
            if elements is not None:
                entry = tl.load(partial + line * width + q_block)
                seen = keep_elements(seen, elements, entry, inner_row[None, :], inner_col[:, None], Q_BLOCK, K_BLOCK)
            if bias is not None:
                b_base = bias + batch * bias_strides[0] + head * bias_strides[1]
                added, seen = add_bias(seen, b_base, row[None, :], col[:, None], bias_strides[2], bias_strides[3])
            logits, bent = soften(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap)
            if bias is not None:
                logits += added * LOG2E
            prob = tl.exp2(tl.where(seen, logits - lse2[None, :], HIDDEN))
            dv_acc += tl.dot(prob.to(g.dtype), g, input_precision=PRECISION)
            slope = prob * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - slope_mean[None, :])
            if softcap is not None:
                slope *= 1.0 - bent * bent
            slope = tl.where(seen, slope, 0.0)  # last: a key that nobody sees may be NaN
            dk_acc += tl.dot(slope.to(q.dtype), q, input_precision=PRECISION)

    first_row = (batch * owners + owner) * num_rows
    store_rows(dk + first_row * D, dk_acc * scale, index, store_ok, D, 1, D, BLOCK_D)
    store_rows(dv + first_row * DV, dv_acc, index, store_ok, DV, 1, DV, BLOCK_DV)


@triton.jit
def sum_kernel(parts, order, bounds, total, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Add to row ``i`` of ``total`` the rows ``order[bounds[i] : bounds[i + 1]]`` of ``parts``; grid ``[rows]``."""
    row = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(bounds + row), tl.load(bounds + row + 1)
    acc = tl.zeros([BLOCK], tl.float32)
    for at in range(start, stop, ROWS):
        number = at + tl.arange(0, ROWS)
        index = tl.load(order + number, mask=number < stop, other=0)
        acc += tl.sum(load_rows(parts, index, number < stop, DIM, 1, DIM, BLOCK), 0)
    dim = tl.arange(0, BLOCK)
    if stop > start:
        where = total + row * DIM + dim
        tl.store(where, tl.load(where, mask=dim < DIM) + acc, mask=dim < DIM)
