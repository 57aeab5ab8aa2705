"""Claim: the gain of neighbourhood attention follows a count of tiles, and is reached where tiles waste nothing.

Paper: Hassani et al. 2025 (Generalized Neighborhood Attention), https://arxiv.org/abs/2504.16922, Sec. 4: the bound by
counting tiles is more realistic than that by counting FLOPs, and their kernel reaches it "in many perfectly
block-sparse cases". Here neighbourhoods on grids of two and three dimensions are computed with the tiles that the
simulator finds best, and timed in turns with dense attention, not causal, by the same kernel. `holds` if over all cases
the rank correlation of predicted and measured speedup is at least 0.9, and at least half of the perfectly block-sparse
cases reach at least 0.9 of the bound.

What is judged is the kernel, whose tiles the simulator counts; the whole call, with tokens put in the order of tiles
and back, and PyTorch's dense attention are reported beside it. Differences: CPU instead of a B200, tiles of 64 by 64,
and shapes of thousands of tokens, not those of the paper's video models.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attention.neighbourhood import neighbourhood_attention
from ..kernels.attention import sparse_attention
from ..measure.cost import Comparison, time_interleaved
from ..ops.formats.block import BlockMask
from ..ops.neighbourhood import grid_axes, tiled_neighbourhood
from ..ops.tile_speedup import best_tiles, simulate_speedup
from . import CLAIMS
from .base import ClaimResult

NAME = "gna-simulator"
HEADS, DIM, BLOCK = 4, 64, 64
LEAST_CORRELATION, LEAST_SHARE = 0.9, 0.9
Case = tuple[tuple[int, ...], tuple[int, ...]]  # window, stride
CASES: dict[tuple[int, ...], tuple[Case, ...]] = {
    (96, 96): (
        ((24, 24), (1, 1)),
        ((24, 24), (24, 24)),
        ((36, 36), (4, 4)),
        ((40, 40), (8, 8)),
        ((48, 48), (1, 1)),
        ((48, 48), (16, 16)),
        ((64, 64), (16, 16)),
    ),
    (16, 24, 24): (
        ((8, 8, 8), (1, 1, 1)),
        ((8, 8, 8), (8, 8, 8)),
        ((8, 12, 12), (2, 2, 2)),
        ((12, 12, 12), (4, 4, 4)),
        ((12, 18, 18), (1, 1, 1)),
        ((16, 16, 16), (16, 8, 8)),
        ((16, 12, 24), (16, 12, 24)),
    ),
}
QUICK_CASES = {shape: (cases[1], cases[2], cases[3], cases[4]) for shape, cases in CASES.items()}


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Time neighbourhoods and dense attention, and compare with what the simulator said.

    Args:
        quick: fewer cases and rounds.
        seed: of queries, keys and values.
    """
    started = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    rounds = 3 if quick else 9
    for shape, cases in (QUICK_CASES if quick else CASES).items():
        query, key, value = (torch.randn(1, HEADS, math.prod(shape), DIM, generator=generator) for _ in range(3))
        variants: dict[str, Callable[[], object]] = {
            "dense": functools.partial(_kernel, query, key, value, _dense(math.prod(shape))),
            "sdpa": functools.partial(scaled_dot_product_attention, query, key, value),
        }
        for number, (window, stride) in enumerate(cases):
            axes = grid_axes(NAME, shape, window, stride)
            tiled = tiled_neighbourhood(axes, *best_tiles(axes, BLOCK, BLOCK))
            laid = query.index_select(2, tiled.query_order.clamp(min=0))
            laid_key, laid_value = (x.index_select(2, tiled.key_order.clamp(min=0)) for x in (key, value))
            variants[f"kernel {number}"] = functools.partial(_kernel, laid, laid_key, laid_value, tiled.pattern)
            variants[f"call {number}"] = functools.partial(
                neighbourhood_attention, query, key, value, shape, window_size=window, stride=stride
            )
        timed = time_interleaved(variants, repeats=rounds, warmup=1)
        rows += [_row(shape, window, stride, number, timed) for number, (window, stride) in enumerate(cases)]
    predicted, measured = ([row[name] for row in rows] for name in ("tile_bound", "measured"))
    perfect = [row["share_of_bound"] for row in rows if row["perfect"]]
    reached = sum(share >= LEAST_SHARE for share in perfect)
    correlation = rank_correlation(predicted, measured)
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"share of the bound reached in many perfectly block-sparse cases": 1.0},
        measured={
            "rank_correlation_with_tile_bound": correlation,
            "rank_correlation_with_flop_bound": rank_correlation([row["flop_bound"] for row in rows], measured),
            "perfect_cases": len(perfect),
            "perfect_cases_that_reach_it": reached,
            "median_share_of_bound_in_perfect_cases": statistics.median(perfect) if perfect else None,
            "cases": rows,
        },
        holds=correlation >= LEAST_CORRELATION and bool(perfect) and 2 * reached >= len(perfect),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "heads": HEADS,
            "head_dim": DIM,
            "tile": BLOCK,
            "dtype": "float32",
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "least_correlation": LEAST_CORRELATION,
            "least_share": LEAST_SHARE,
        },
    )


def _row(shape: Sequence[int], window: Sequence[int], stride: Sequence[int], number: int, timed: Comparison) -> Any:
    q_tile, k_tile = best_tiles(grid_axes(NAME, shape, window, stride), BLOCK, BLOCK)
    bound = simulate_speedup(shape, window, stride=stride, q_tile=q_tile, k_tile=k_tile)
    gain, whole = (timed.paired_speedup(f"{what} {number}") for what in ("kernel", "call"))
    sdpa = timed.timings["sdpa"].median / timed.timings[f"call {number}"].median
    return {
        "shape": list(shape),
        "window": list(window),
        "stride": list(stride),
        "q_tile": list(q_tile),
        "k_tile": list(k_tile),
        "density": 1 / bound.flops,
        "masked_tiles": bound.masked,
        "perfect": bound.perfect,
        "flop_bound": bound.flops,
        "tile_bound": bound.tiles,
        "measured": gain,
        "share_of_bound": gain / bound.tiles,
        "measured_with_permutation": whole,
        "measured_with_permutation_over_sdpa": sdpa,
    }


def _dense(length: int) -> BlockMask:
    blocks = -(-length // BLOCK)
    return BlockMask(torch.ones(1, 1, blocks, blocks, dtype=torch.bool), BLOCK, BLOCK, length, length)


def _kernel(query: Tensor, key: Tensor, value: Tensor, pattern: BlockMask) -> Tensor:
    return sparse_attention(query, key, value, pattern, causal=False)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values at their mean rank; 0 where one side is constant."""
    ranks = []
    for values in (first, second):
        x = torch.tensor(list(values), dtype=torch.float64)
        below, equal = (x > x.unsqueeze(-1)).sum(0), (x == x.unsqueeze(-1)).sum(0)
        rank = below + (equal + 1) / 2
        ranks.append(rank - rank.mean())
    norm = ranks[0].norm() * ranks[1].norm()
    return float(ranks[0] @ ranks[1] / norm) if norm > 0 else 0.0
