"""Claim: HyperAttention scales almost linearly, and its lead over exact attention grows with the length.

Paper: Han et al. 2023, https://arxiv.org/abs/2310.05869, Sec. 4.2 and Figure 4: one attention layer, forward, against
exact attention, with and without a causal mask. Measured here: seconds by length, their exponents (slope of the log-log
line), and the speed-up. `holds` if, for both masks, the exponent is at least 0.3 below that of PyTorch's exact
attention and the speed-up grows at every step past the length up to which the method is exact itself. The exact
attention of this library's own kernel is timed beside it, because the method runs on that kernel: against it the
speed-up is the method's alone.

What it costs is said by the error of the output, for normal queries, keys and values (nothing to find: the samples do
all the work) and for ones in clusters (most of the mass is where the hash can find it, and keys that are alike carry
values that are alike). *Relative* is the norm of the error over that of the exact output: large for normal ones, where
an output is the mean of thousands of values around zero, which few samples cannot know. *Spectral* is the paper's
measure, the operator norm of the error over that of the values, an upper limit of its epsilon. The claim does not
depend on either. Differences: up to 64k tokens, the paper up to 131k; one head, a CPU.
"""

import itertools
import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from ..attention.hyper import Hyper, hyper_attention
from ..attention.prompt import Prompt
from ..kernels.attention import sparse_attention
from ..measure.cost import Comparison, time_interleaved
from ..ops.formats.block import BlockMask
from ..ops.formats.stripes import Window
from . import CLAIMS
from .base import ClaimResult

NAME = "hyper-scaling"
LENGTHS = (4096, 8192, 16384, 32768, 65536)
QUICK_LENGTHS = (4096, 8192, 16384)
ERROR_LENGTH, QUICK_ERROR_LENGTH = 16384, 8192
EXACT_LENGTH, BLOCK, DIM, CLUSTERS = 4096, 256, 64, 64
MARGIN = 0.3


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Time all three by length, and measure the error at one length.

    Args:
        quick: up to 16k tokens, and one draw for the error.
        seed: of queries, keys and values, and of the method.
    """
    started = time.monotonic()
    lengths = QUICK_LENGTHS if quick else LENGTHS
    policy = Hyper(exact_length=EXACT_LENGTH, q_block=BLOCK, num_samples=BLOCK, seed=seed)
    masks: dict[str, Any] = {}
    for causal in (False, True):
        rows = [_timed(length, policy, causal, seed, long=length > 16384) for length in lengths]
        masks["causal" if causal else "unmasked"] = {
            "by_length": rows,
            "exponents": {name: _slope(lengths, [row["seconds"][name] for row in rows]) for name in rows[0]["seconds"]},
        }
    errors: dict[str, Any] = {}
    for draw in range(seed, seed + (1 if quick else 3)):
        for kind in ("normal", "clustered"):
            for mask, found in _errors(kind, QUICK_ERROR_LENGTH if quick else ERROR_LENGTH, policy, draw).items():
                errors.setdefault(kind, {}).setdefault(mask, []).append(found)
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"speed-up at 131k, unmasked": 54, "speed-up at 131k, causal": 5.4},
        measured={**masks, "error": errors},
        holds=all(_holds(mask) for mask in masks.values()),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "lengths": list(lengths),
            "heads": 1,
            "dim": DIM,
            "exact_length": EXACT_LENGTH,
            "block": BLOCK,
            "samples": BLOCK,
            "margin": MARGIN,
            "error_length": QUICK_ERROR_LENGTH if quick else ERROR_LENGTH,
        },
    )


def draw_inputs(kind: str, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``[1, 1, length, DIM]``: normal, or near `CLUSTERS` directions, logits up to 8."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 1, length, DIM, generator=generator) for _ in range(3))
    if kind == "normal":
        return query, key, value
    centres = normalize(torch.randn(CLUSTERS, DIM, generator=generator), dim=-1)
    mine, theirs = (torch.randint(CLUSTERS, (length,), generator=generator) for _ in range(2))
    near = [
        normalize(centres[cluster] + 0.3 * noise / math.sqrt(DIM), dim=-1) * math.sqrt(DIM)
        for cluster, noise in ((mine, query), (theirs, key))
    ]
    carried = torch.randn(CLUSTERS, DIM, generator=generator)
    return near[0], near[1], carried[theirs] + 0.3 * value


def _timed(length: int, policy: Hyper, causal: bool, seed: int, *, long: bool) -> dict[str, Any]:
    query, key, value = draw_inputs("normal", length, seed)
    prompt = Prompt(scale=DIM**-0.5)
    whole = BlockMask.causal(length, q_block=BLOCK, k_block=BLOCK)
    everything = BlockMask(torch.ones_like(whole.blocks), BLOCK, BLOCK, length, length)
    found: Comparison = time_interleaved(
        {
            "exact": lambda: scaled_dot_product_attention(query, key, value, is_causal=causal),
            "own_exact": lambda: sparse_attention(
                query, key, value, Window(length) if causal else everything, causal=causal
            ),
            "hyper": lambda: (
                policy.compute(query, key, value, prompt)
                if causal
                else hyper_attention(query, key, value, policy=policy, prompt=prompt)
            ),
        },
        repeats=2 if long else 5,
        warmup=0 if long else 1,
    )
    row: dict[str, Any] = {
        "length": length,
        "seconds": {name: timing.min for name, timing in found.timings.items()},
    }
    row["speedup"] = {name: row["seconds"][name] / row["seconds"]["hyper"] for name in ("exact", "own_exact")}
    if causal:
        row["density"] = int(policy.compute(query, key, value, prompt).kept) / (length * (length + 1) // 2)
    return row


def _errors(kind: str, length: int, policy: Hyper, seed: int) -> dict[str, dict[str, float]]:
    query, key, value = draw_inputs(kind, length, seed)
    prompt = Prompt(scale=DIM**-0.5)
    outs = {
        "causal": policy.compute(query, key, value, prompt).out,
        "unmasked": hyper_attention(query, key, value, policy=policy, prompt=prompt)[0],
    }
    found: dict[str, dict[str, float]] = {}
    for name, out in outs.items():
        exact = scaled_dot_product_attention(query, key, value, is_causal=name == "causal")
        error = (out - exact)[0, 0]
        found[name] = {
            "relative": float(error.norm() / exact.norm()),
            "spectral": float(torch.linalg.matrix_norm(error, 2) / torch.linalg.matrix_norm(value[0, 0], 2)),
        }
    return found


def _slope(lengths: tuple[int, ...], seconds: list[float]) -> float:
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(s) for s in seconds]).slope


def _holds(mask: dict[str, Any]) -> bool:
    past = [row["speedup"]["exact"] for row in mask["by_length"] if row["length"] > EXACT_LENGTH]
    flatter = mask["exponents"]["hyper"] < mask["exponents"]["exact"] - MARGIN
    return flatter and all(shorter < longer for shorter, longer in itertools.pairwise(past))
