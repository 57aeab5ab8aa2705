"""The Triton kernel of sparse attention forward, and what the backward kernels share with it.

Tiles as in FlashAttention-2: a program owns up to ``BLOCK_M`` queries of one block of queries, one head and one row of
the batch, and runs over the keys that the pattern keeps, ``BLOCK_N`` at a time, with a running maximum and sum. Keys
come from two loops, each left out where there is nothing for it: single keys by their positions, and blocks of keys,
by a list or, for a window, by a range.

Every load of a key is masked by what the queries of the tile can see, so that a NaN in a key that none of them sees
stays out: ``0 * NaN`` in a product would let it in. Offsets are 64 bits where a stride can make them large.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(float("-inf"))


@triton.jit
def load_rows(base, index, ok, stride, dim_stride, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``index`` of a matrix ``[n, DIM]`` as ``[len(index), BLOCK]``; 0 where not ``ok``."""
    dim = tl.arange(0, BLOCK)
    offsets = index.to(tl.int64)[:, None] * stride + dim.to(tl.int64)[None, :] * dim_stride
    return tl.load(base + offsets, mask=ok[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(base, values, index, ok, stride, dim_stride, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The opposite of `load_rows`; converts to what ``base`` holds."""
    dim = tl.arange(0, BLOCK)
    offsets = index.to(tl.int64)[:, None] * stride + dim.to(tl.int64)[None, :] * dim_stride
    tl.store(base + offsets, values.to(base.dtype.element_ty), mask=ok[:, None] & (dim < DIM)[None, :])


@triton.jit
def in_reach(col, ok, first, last, padding, window, near, CAUSAL: tl.constexpr, FAR: tl.constexpr):
    """Which keys ``col`` at least one of the queries at ``first`` to ``last`` sees, by positions and padding."""
    ok &= col > first - window
    if CAUSAL:
        ok &= col <= last
    if FAR:
        ok &= col <= last - near
    if padding is not None:
        ok &= tl.load(padding + col, mask=ok, other=0) != 0
    return ok


@triton.jit
def sees(ok, at, col, window, near, CAUSAL: tl.constexpr, FAR: tl.constexpr):
    """Pairs of a query ``at`` and a key ``col`` (broadcast against each other) where the query sees the key.

    ``FAR`` is for sinks: they are seen here only by queries that do not have them in their window of ``near`` keys.
    """
    ok = ok & (col > at - window)
    if CAUSAL:
        ok &= col <= at
    if FAR:
        ok &= col <= at - near
    return ok


@triton.jit
def keep_elements(seen, elements, entry, row, col, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr):
    """``seen`` where the mask of a partial block keeps the element too; ``entry`` -1 is a whole block."""
    inside = seen & (tl.full(seen.shape, entry, tl.int32) >= 0)
    offsets = entry.to(tl.int64) * (Q_BLOCK * K_BLOCK) + row * K_BLOCK + col
    return seen & (tl.load(elements + offsets, mask=inside, other=1) != 0)


@triton.jit
def add_bias(seen, bias, row, col, row_stride, col_stride):
    """The bias of the pairs seen, and ``seen`` without those where it is -inf."""
    added = tl.load(bias + row.to(tl.int64) * row_stride + col.to(tl.int64) * col_stride, mask=seen, other=HIDDEN)
    return added.to(tl.float32), seen & (added != HIDDEN)


@triton.jit
def soften(products, scale, softcap):
    """Logits times ``log2(e)`` before the bias, and ``tanh`` where there is a cap (otherwise anything)."""
    if softcap is None:
        return products * (scale * LOG2E), products
    else:
        bent = 2.0 * tl.sigmoid(products * (2.0 * scale / softcap)) - 1.0
        return bent * (softcap * LOG2E), bent


@triton.jit
def _attend(
    acc, total, high, q, row, at, row_ok, first, last, col, ok, inner_row, inner_col, entry,
    key, value, padding, bias, elements, k_strides, v_strides, bias_strides, scale, softcap, window, near,
    CAUSAL: tl.constexpr, FAR: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys more in the running softmax."""
    ok = in_reach(col, ok, first, last, padding, window, near, CAUSAL, FAR)
    seen = sees(row_ok[:, None] & ok[None, :], at[:, None], col[None, :], window, near, CAUSAL, FAR)
    if elements is not None:
        seen = keep_elements(seen, elements, entry, inner_row[:, None], inner_col[None, :], Q_BLOCK, K_BLOCK)
    if bias is not None:
        added, seen = add_bias(seen, bias, row[:, None], col[None, :], bias_strides[2], bias_strides[3])
    if elements is not None or bias is not None:
        ok = tl.max(seen.to(tl.int32), 0) > 0
    k = load_rows(key, col, ok, k_strides[2], k_strides[3], D, BLOCK_D)
    logits, _ = soften(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap)
    if bias is not None:
        logits += added * LOG2E
    logits = tl.where(seen, logits, HIDDEN)
    higher = tl.maximum(high, tl.max(logits, 1))
    base = tl.where(higher == HIDDEN, 0.0, higher)  # -inf - -inf is NaN
    prob = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(high - base)
    v = load_rows(value, col, ok, v_strides[2], v_strides[3], DV, BLOCK_DV)
    acc = acc * shrink[:, None] + tl.dot(prob.to(v.dtype), v, input_precision=PRECISION)
    return acc, total * shrink + tl.sum(prob, 1), higher


@triton.jit
def forward_kernel(
    query, key, value, out, lse, out_strides,
    positions, counts, blocks, partial, elements, padding, bias,
    q_strides, k_strides, v_strides, bias_strides, list_strides, width,
    heads, group, list_heads, q_len, kv_len, scale, softcap, window, near,
    CAUSAL: tl.constexpr, RANGE: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention; grid ``[tiles of queries, B * H]``, arguments from `paucity.kernels.attention.triton_plan`."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal cut the last tiles take longest
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    kv_head, list_head = head // group, head * list_heads // heads
    q_subs: tl.constexpr = (Q_BLOCK + BLOCK_M - 1) // BLOCK_M
    k_subs: tl.constexpr = (K_BLOCK + BLOCK_N - 1) // BLOCK_N
    q_block = tile // q_subs
    inner_row = (tile % q_subs) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = q_block * Q_BLOCK + inner_row
    row_ok = (inner_row < Q_BLOCK) & (row < q_len)
    at = row + kv_len - q_len
    first = q_block * Q_BLOCK + (tile % q_subs) * BLOCK_M + kv_len - q_len
    last = (
        tl.minimum(q_block * Q_BLOCK + tl.minimum((tile % q_subs + 1) * BLOCK_M, Q_BLOCK), q_len) + kv_len - q_len - 1
    )

    query += batch * q_strides[0] + head * q_strides[1]
    key += batch * k_strides[0] + kv_head * k_strides[1]
    value += batch * v_strides[0] + kv_head * v_strides[1]
    if padding is not None:
        padding += batch * kv_len
    if bias is not None:
        bias += batch * bias_strides[0] + head * bias_strides[1]
    q = load_rows(query, row, row_ok, q_strides[2], q_strides[3], D, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    high = tl.full([BLOCK_M], HIDDEN, tl.float32)

    line = batch * list_strides[0] + list_head * list_strides[1] + q_block.to(tl.int64) * list_strides[2]
    if positions is not None:
        count = tl.load(counts + line)
        for start in range(width - count, width, BLOCK_N):
            slot = start + tl.arange(0, BLOCK_N)
            col = tl.load(positions + line * width + slot, mask=slot < width, other=-1)
            acc, total, high = _attend(
                acc, total, high, q, row, at, row_ok, first, last, col, (col >= 0) & (col < kv_len),
                inner_row, col, -1, key, value, padding, bias, None, k_strides, v_strides, bias_strides,
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
            acc, total, high = _attend(
                acc, total, high, q, row, at, row_ok, first, last, col, (inner_col < K_BLOCK) & (col < kv_len),
                inner_row, inner_col, entry, key, value, padding, bias, elements, k_strides, v_strides, bias_strides,
                scale, softcap, reach, near, CAUSAL, False, Q_BLOCK, K_BLOCK, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    out += batch * out_strides[0] + head * out_strides[1]
    store_rows(out, acc, row, row_ok, out_strides[2], out_strides[3], DV, BLOCK_DV)
    log = tl.where(empty, HIDDEN, (tl.where(empty, 0.0, high) + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(lse + tl.program_id(1).to(tl.int64) * q_len + row, log, mask=row_ok)
