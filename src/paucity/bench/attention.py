"""The attention kernel alone, with the pattern given, against causal SDPA of the same shape."""

from collections.abc import Callable
from functools import partial

import torch

from ..kernels.attention import Pattern, sparse_attention
from ..measure.cost import time_interleaved
from ..ops.formats.block import BlockMask
from ..ops.formats.stripes import Window
from . import BenchRow

SHAPE = {"batch": 1, "heads": 8, "tokens": 8192, "dim": 64}
BLOCK = 128


def run() -> list[BenchRow]:
    """Rows for both dtypes: 10 % and 100 % of the causal blocks, and a window of 512 with 64 sinks."""
    return [row for dtype in (torch.bfloat16, torch.float32) for row in _rows(dtype)]


def _patterns(heads: int, tokens: int) -> dict[str, Pattern]:
    blocks = tokens // BLOCK
    generator = torch.Generator().manual_seed(0)
    causal = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    some = (torch.rand(1, heads, blocks, blocks, generator=generator) < 0.1) | torch.eye(blocks, dtype=torch.bool)
    return {
        "block10": BlockMask(some & causal, BLOCK, BLOCK, tokens, tokens),
        "block100": BlockMask(causal.expand(1, heads, -1, -1), BLOCK, BLOCK, tokens, tokens),
        "window512": Window(512, 64, BLOCK),
    }


def _rows(dtype: torch.dtype) -> list[BenchRow]:
    batch, heads, tokens, dim = SHAPE.values()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(batch, heads, tokens, dim, generator=generator).to(dtype) for _ in range(3))
    patterns = _patterns(heads, tokens)
    variants: dict[str, Callable[[], torch.Tensor]] = {
        "dense": partial(torch.nn.functional.scaled_dot_product_attention, query, key, value, is_causal=True)
    }
    for name, pattern in patterns.items():
        variants[name] = partial(sparse_attention, query, key, value, pattern)
    with torch.no_grad():
        timings = time_interleaved(variants, repeats=5, warmup=1).timings
    pairs = tokens * (tokens + 1) / 2
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    return [
        BenchRow(
            bench=f"attention.{name}.{short}",
            size=f"B{batch} H{heads} D{dim} T{tokens}, causal",
            ours="PyTorch tiles, pattern given",
            baseline="causal SDPA",
            seconds=timings[name].median,
            baseline_seconds=timings["dense"].median,
            limit_ratio=pairs / _kept(pattern, tokens),
        )
        for name, pattern in patterns.items()
    ]


def _kept(pattern: Pattern, tokens: int) -> float:
    """Causal pairs that the pattern keeps, mean over heads."""
    if isinstance(pattern, BlockMask):
        return float(pattern.density(causal=True).mean()) * tokens * (tokens + 1) / 2
    return float(pattern.kept_pairs(tokens, tokens).double().mean())
