"""Claim: HiP's cost grows as T log T, where that of dense attention grows as T².

Paper: Lee et al. 2024 (HiP), https://arxiv.org/abs/2406.09827, abstract and Sec. 3: O(T log T) time. Queries and keys
are drawn at random (no time depends on their values), at the method's defaults. An exponent is the slope of a straight
line through the logarithms of length and time. With a fixed ``k`` the selection makes ``2 k log2(T / k)`` products a
query, which over these lengths grows by an exponent well above 1 itself; that of the products, counted exactly, is
beside it, and the claim is that the time follows it.

Holds when the selection's exponent is below the products' plus 0.2, the attention's below 1.25, the dense one above
1.75, and that of selection and attention together at least 0.4 below the dense one. Times are the shortest of the
rounds. Differences: the paper counts and times a whole model on a GPU; this is one layer on the machine at hand.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attention import Hierarchical, Prompt, attend_pattern
from ..measure.cost import time_interleaved
from ..measure.flops import flops
from . import CLAIMS
from .base import ClaimResult

NAME = "hip-scaling"
LENGTHS, QUICK_LENGTHS = (4096, 8192, 16384, 32768, 65536), (4096, 8192, 16384)
HEADS, DIM = 2, 64
REPEATS = 3
SLACK, LINEAR, QUADRATIC, GAP = 0.2, 1.25, 1.75, 0.4


def exponent(costs: Mapping[int, float]) -> float:
    """Slope of log cost over log length, by least squares."""
    points = [(math.log(length), math.log(cost)) for length, cost in costs.items()]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def holds(exponents: Mapping[str, float]) -> bool:
    """Whether the exponents are those of the paper, within what is stated above."""
    return (
        exponents["selection"] < exponents["products"] + SLACK
        and exponents["attention"] < LINEAR
        and exponents["dense"] > QUADRATIC
        and exponents["total"] < exponents["dense"] - GAP
    )


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Time selection, attention and dense attention at several lengths, all in turns, and fit the exponents.

    Args:
        quick: up to 16384 tokens instead of 65536.
        seed: of queries, keys and values.
    """
    started = time.monotonic()
    lengths, policy, prompt = QUICK_LENGTHS if quick else LENGTHS, Hierarchical(), Prompt(scale=DIM**-0.5)
    generator = torch.Generator().manual_seed(seed)
    calls: dict[str, Callable[[], object]] = {}
    products, density = {}, {}
    for length in lengths:
        shape = (1, HEADS, length, DIM)
        query, key, value = (torch.randn(shape, generator=generator).bfloat16() for _ in range(3))
        pattern = policy.select(query, key, prompt)
        choose = partial(policy.select, query, key, prompt)
        products[length] = flops(choose) / 2
        density[length] = float(pattern.kept_pairs(length, length).double().mean()) / (length * (length + 1) / 2)
        calls[f"selection {length}"] = choose
        calls[f"attention {length}"] = partial(attend_pattern, query, key, value, pattern, prompt)
        calls[f"dense {length}"] = partial(_dense, query, key, value)
    timings = time_interleaved(calls, repeats=REPEATS).timings
    kinds = ("selection", "attention", "dense")
    seconds = {kind: {length: timings[f"{kind} {length}"].min for length in lengths} for kind in kinds}
    seconds["total"] = {length: seconds["selection"][length] + seconds["attention"][length] for length in lengths}
    exponents = {kind: exponent(costs) for kind, costs in (seconds | {"products": products}).items()}
    rows: list[dict[str, Any]] = [
        {
            "length": length,
            "density": density[length],
            "ms": {kind: costs[length] * 1e3 for kind, costs in seconds.items()},
            "speedup_over_dense": seconds["dense"][length] / seconds["total"][length],
            "selection_share": seconds["selection"][length] / seconds["total"][length],
        }
        for length in lengths
    ]
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"time": "O(T log T)", "time of dense attention": "O(T^2)"},
        measured={"exponents": exponents, "by_length": rows},
        holds=holds(exponents),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "policy": policy.model_dump(mode="json"),
            "heads": HEADS,
            "dim": DIM,
            "dtype": "bfloat16",
            "repeats": REPEATS,
            "thresholds": {"slack": SLACK, "linear": LINEAR, "quadratic": QUADRATIC, "gap": GAP},
        },
    )


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True)
