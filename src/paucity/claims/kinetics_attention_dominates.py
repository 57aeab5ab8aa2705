"""Claim: in test-time scaling reading keys and values costs more than the parameters do, most of all in small models.

Paper: Sadhukhan et al. 2025 (Kinetics), https://arxiv.org/abs/2506.05333: from 4,096 generated tokens on, attention
can cost 10 to 1000 times what the parameters do (``Phi``, at 562.5 operations a byte, an NVIDIA B200); Qwen3-0.6B needs
3.5 GB of keys and values for 32k tokens and Qwen3-32B only 8 GB; twice the parameters make them 1.2 times as large; so
the laws that count operations alone overestimate small models.

Counted here from the published sizes of Qwen3, with matrices alone as parameters, and timed on this machine: decode
steps of two random Llamas that keep as much of a token and differ in their matrices, at growing contexts, cache read
once and not copied (`measure.dense`). The attention's share of a step is what it takes beyond the same step with one
cached token; the predicted share is that of the cost model with the machine measured in the same rounds.

Holds when ``Phi`` exceeds 1 at 4,096 and 10 at 32,768 tokens for every Qwen3; doubled parameters make the cache less
than 1.5 times as large; counting memory at least halves the advantage of the smallest over the largest; and, timed, the
share grows wherever the context grows fourfold, passes one half in both Llamas, and is larger in the smaller one at the
longest context. Differences: a CPU does some 15 operations a byte, not 562, so that its weights count, which the paper
leaves out; no accuracy is measured.
"""

import itertools
import math
import statistics
import time
from typing import Any

import torch
from transformers import Qwen3Config

from ..kinetics import B200_INTENSITY, Shape, attention_ratio, crossover, decode, eflops, predict, shape_of
from ..measure.dense import decode_step, random_llama
from ..measure.machine import Machine
from ..measure.probes import Probes
from . import CLAIMS
from .base import ClaimResult

NAME = "kinetics-attention-dominates"
QWEN3 = {  # hidden, inner, layers, heads, tied; 8 key-value heads of 128 and 151,936 tokens in all of them
    "Qwen3-0.6B": (1024, 3072, 28, 16, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen3-4B": (2560, 9728, 36, 32, True),
    "Qwen3-8B": (4096, 12288, 36, 32, False),
    "Qwen3-14B": (5120, 17408, 40, 40, False),
    "Qwen3-32B": (5120, 25600, 64, 64, False),
}
LLAMAS: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8},
    "large": {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16},
}
COMMON = {"num_hidden_layers": 12, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096}
CONTEXTS, QUICK_CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768), (1024, 4096, 16384)
BATCH, ROUNDS, QUICK_ROUNDS = 4, 7, 3
SHORT, LONG = 4096, 32768
DOUBLED, HALVED = 1.5, 2.0


def qwen3() -> dict[str, Shape]:
    """The dense Qwen3 models by their published sizes."""
    shapes = {}
    for name, (hidden, inner, layers, heads, tied) in QWEN3.items():
        config = Qwen3Config(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=tied,
            max_position_embeddings=40960,
        )  # fmt: skip
        shapes[name] = shape_of(config, name=name)
    return shapes


def counted(shapes: dict[str, Shape]) -> dict[str, Any]:
    """What follows from the sizes alone, for one long answer to a prompt of one token."""
    first, *_, last = shapes.values()
    points = [(math.log2(shape.parameters), math.log2(shape.cache)) for shape in shapes.values()]
    costs = {shape.name: decode(shape, 1, steps=LONG) for shape in (first, last)}
    by_flops = 2 * LONG * (last.linear + last.head) / (2 * LONG * (first.linear + first.head))
    return {
        "models": [
            {
                "model": name,
                "parameters": shape.parameters,
                "cache_gib_at_32k": shape.cache_bytes(LONG) / 2**30,
                f"phi_{SHORT}": attention_ratio(shape, prompt=0, generate=SHORT),
                f"phi_{LONG}": attention_ratio(shape, prompt=0, generate=LONG),
            }
            for name, shape in shapes.items()
        ],
        "cache_growth_when_parameters_double": 2 ** statistics.linear_regression(*zip(*points, strict=True)).slope,
        "largest_over_smallest_by_parameters": by_flops,
        "largest_over_smallest_by_eflops": eflops(costs[last.name], B200_INTENSITY)
        / eflops(costs[first.name], B200_INTENSITY),
    }


def holds(found: dict[str, Any], shares: dict[str, dict[int, float]]) -> bool:
    """Whether the counts and the measured shares of attention are as stated above."""
    small, large = (list(by_context.values()) for by_context in shares.values())
    return (
        all(row[f"phi_{SHORT}"] > 1 and row[f"phi_{LONG}"] > 10 for row in found["models"])
        and found["cache_growth_when_parameters_double"] < DOUBLED
        and found["largest_over_smallest_by_eflops"] * HALVED < found["largest_over_smallest_by_parameters"]
        and all(
            by_context[long] > by_context[short]
            for by_context in shares.values()
            for short, long in itertools.combinations(by_context, 2)
            if long >= 4 * short
        )
        and min(small[-1], large[-1]) > 0.5
        and small[-1] > large[-1]
    )


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Count the published models; time two Llamas and the machine in turns.

    Args:
        quick: three contexts up to 16,384 tokens.
        seed: of weights and caches.
    """
    started = time.monotonic()
    contexts, rounds = (QUICK_CONTEXTS, QUICK_ROUNDS) if quick else (CONTEXTS, ROUNDS)
    models = {
        name: random_llama(torch.bfloat16, context=max(contexts) + 1, seed=seed, **COMMON, **sizes)
        for name, sizes in LLAMAS.items()
    }
    shapes = {name: shape_of(model.config, name=name) for name, model in models.items()}
    probes, best = Probes(("bfloat16",)), dict[tuple[str, int], float]()
    steps = {(name, n): decode_step(model, n, batch=BATCH) for name, model in models.items() for n in (1, *contexts)}
    for turn in range(rounds + 1):
        probes.round()
        for key, step in steps.items():
            begun = time.perf_counter()
            step()
            if turn:
                best[key] = min(best.get(key, math.inf), time.perf_counter() - begun)
    machine = probes.machine()
    shares = {name: {n: 1 - best[name, 1] / best[name, n] for n in contexts} for name in models}
    found = counted(qwen3())
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={
            "attention_over_parameters": "10 to 1000 from 4096 generated tokens on",
            "cache_gb_at_32k": {"Qwen3-0.6B": 3.5, "Qwen3-32B": 8},
            "cache_growth_when_parameters_double": 1.2,
        },
        measured=found
        | {
            "timed": [_timed(shapes[name], machine, best, shares[name]) for name in models],
            "operations_a_byte": machine.intensity("bfloat16"),
        },
        holds=holds(found, shares),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "intensity": B200_INTENSITY,
            "llamas": {name: COMMON | sizes for name, sizes in LLAMAS.items()},
            "batch": BATCH,
            "rounds": rounds,
            "dtype": "bfloat16",
        },
    )


def _timed(
    shape: Shape, machine: Machine, best: dict[tuple[str, int], float], shares: dict[int, float]
) -> dict[str, Any]:
    crossed = next((n for n, share in shares.items() if share > 0.5), None)
    return {
        "model": shape.name,
        "parameters": shape.parameters,
        "crossed_at": crossed,
        "crossover_predicted": crossover(shape, machine, batch=BATCH),
        "contexts": [
            {
                "context": n,
                "ms": 1e3 * best[shape.name, n],
                "attention_share": share,
                "attention_share_predicted": predict(shape, decode(shape, n, batch=BATCH), machine).attention_share,
            }
            for n, share in shares.items()
        ],
    }
