"""The attention kernels alone, with the pattern given: prefill and training here, decoding in `pages`."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import Pattern, sparse_attention
from ..measure.cost import time_interleaved
from ..measure.machine import least_seconds
from ..ops.formats.block import BlockMask
from ..ops.formats.stripes import KeyLists, Window
from . import BenchRow, pages

SHAPE = {"batch": 1, "heads": 8, "tokens": 8192, "dim": 64}
BLOCK = 128
SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def run() -> list[BenchRow]:
    """Forward in both dtypes, forward and backward, the same mask in FlexAttention, and decoding."""
    rows = [row for dtype in SHORT for row in _forward(dtype)]
    return [*rows, *_train(), *pages.run()]


def patterns(heads: int, tokens: int) -> dict[str, Pattern]:
    """10 % and all of the causal blocks, 10 % of single keys, and a window of 512 with 64 sinks."""
    blocks = -(-tokens // BLOCK)
    generator = torch.Generator().manual_seed(0)
    causal = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    keys = torch.rand(1, heads, blocks, tokens, generator=generator) < 0.1
    return {
        "block10": BlockMask(tenth(heads, blocks), BLOCK, BLOCK, tokens, tokens),
        "block100": BlockMask(causal.expand(1, heads, -1, -1), BLOCK, BLOCK, tokens, tokens),
        "stripes10": KeyLists.from_mask(keys & causal.repeat_interleave(BLOCK, -1)[:, :tokens], q_block=BLOCK),
        "window512": Window(512, 64, BLOCK),
    }


def tenth(heads: int, blocks: int) -> Tensor:
    """Each head's diagonal and, drawn at random, as many other causal blocks as make 10 % of them all."""
    score = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(0))
    score = score.tril() + 2 * torch.eye(blocks)
    k = max(blocks, round(0.1 * blocks * (blocks + 1) / 2))
    kept = torch.zeros(score.shape, dtype=torch.bool).flatten(2)
    return kept.scatter_(-1, score.flatten(2).topk(k).indices, True).view(score.shape)


def _inputs(dtype: torch.dtype, *, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = tuple(SHAPE.values())
    shape = (shape[0], shape[1], shape[2], shape[3])
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad) for _ in range(3)]


def _forward(dtype: torch.dtype) -> list[BenchRow]:
    query, key, value = inputs = _inputs(dtype)
    dense = partial(F.scaled_dot_product_attention, query, key, value, is_causal=True)
    made = patterns(SHAPE["heads"], SHAPE["tokens"])
    variants: dict[str, Callable[[], object]] = {"causal SDPA": dense}
    variants |= {name: partial(sparse_attention, query, key, value, pattern) for name, pattern in made.items()}
    if dtype == torch.bfloat16:
        variants["compiled FlexAttention"] = _flex(inputs, made["block10"])
    with torch.no_grad():
        timings = time_interleaved(variants, repeats=7, warmup=2).timings
    rows = [
        _row(
            f"{name}.{SHORT[dtype]}", pattern, dtype, timings[name].median, "causal SDPA", timings["causal SDPA"].median
        )
        for name, pattern in made.items()
    ]
    if dtype == torch.bfloat16:
        peer = "compiled FlexAttention"
        seconds = timings["block10"].median, timings[peer].median
        rows.insert(1, _row("block10.flex", made["block10"], dtype, seconds[0], peer, seconds[1]))
    return rows


def _train() -> list[BenchRow]:
    inputs = _inputs(torch.bfloat16, grad=True)
    grad = torch.randn_like(inputs[0])
    pattern = patterns(SHAPE["heads"], SHAPE["tokens"])["block10"]

    def step(attention: Callable[..., Tensor]) -> None:
        torch.autograd.grad(attention(*inputs), inputs, grad)

    variants = {
        "dense": partial(step, partial(F.scaled_dot_product_attention, is_causal=True)),
        "ours": partial(step, partial(sparse_attention, pattern=pattern)),
    }
    timings = time_interleaved(variants, repeats=5, warmup=1).timings
    seconds = timings["ours"].median, timings["dense"].median
    name = "causal SDPA, forward and backward"
    return [_row("train10.bf16", pattern, torch.bfloat16, seconds[0], name, seconds[1], products=3.5)]


def _row(
    name: str,
    pattern: Pattern,
    dtype: torch.dtype,
    seconds: float,
    baseline: str,
    baseline_seconds: float,
    *,
    products: float = 1,
) -> BenchRow:
    batch, heads, tokens, dim = SHAPE.values()
    pairs = float(pattern.kept_pairs(tokens, tokens).double().mean())
    least = least_seconds(
        flops=products * 4 * dim * batch * heads * pairs,
        num_bytes=4 * batch * heads * tokens * dim * dtype.itemsize,
        dtype=dtype,
    )
    share = 2 * pairs / (tokens * (tokens + 1))
    size = f"B{batch} H{heads} D{dim} T{tokens}, causal, {share:.1%} of the pairs"
    return BenchRow(
        f"attention.{name}", size, "sparse_attention, pattern given", baseline, seconds, baseline_seconds,
        baseline_seconds / least,
    )  # fmt: skip


def _flex(inputs: list[Tensor], pattern: Pattern) -> Callable[[], object]:
    """FlexAttention, compiled, with the blocks on the diagonal marked as partial and the others as full."""
    from torch.nn.attention.flex_attention import BlockMask as FlexMask
    from torch.nn.attention.flex_attention import flex_attention

    if not isinstance(pattern, BlockMask):
        raise TypeError("FlexAttention takes blocks.")
    diagonal = torch.eye(pattern.blocks.shape[-1], dtype=torch.bool)
    cut, full = (
        BlockMask(blocks, pattern.q_block, pattern.k_block, pattern.q_len, pattern.kv_len)
        for blocks in (pattern.blocks & diagonal, pattern.blocks & ~diagonal)
    )
    mask = FlexMask.from_kv_blocks(
        cut.kv_num_blocks, cut.kv_indices, full.kv_num_blocks, full.kv_indices,
        BLOCK_SIZE=(pattern.q_block, pattern.k_block), mask_mod=lambda b, h, q, k: q >= k,
        seq_lengths=(pattern.q_len, pattern.kv_len),
    )  # fmt: skip
    return partial(torch.compile(flex_attention), *inputs, block_mask=mask)
