"""Claim: the cost model tells the seconds of decode steps and prefills to within 20 % at the median.

Paper: Sadhukhan et al. 2025 (Kinetics), https://arxiv.org/abs/2506.05333, whose cost model counts operations and bytes
and is not held against a clock there; ``paucity.kinetics`` turns the same counts into seconds on a measured machine,
and this is the check of it.

Random Llamas in bfloat16 are timed through transformers: decode steps with the cache read once and not copied
(`measure.dense`), prefills with SDPA and a new `DynamicCache`. The machine is measured in the same rounds, at other
shapes than these: no matrix, context or number of rows above one that is checked was measured, and nothing is fitted
to the cases. The shortest time of the rounds counts on both sides, as both are what the machine does when it is left
alone; other work on it lengthens the cases more than the shorter probes, and makes the model look too fast.

Holds when the median of ``|predicted - measured| / measured`` over all cases is at most 0.2; the worst is reported, and
beside it what a plain roofline (best products, full bandwidth, nothing else) would have said.
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kinetics import Shape, Work, decode, predict, prefill, shape_of
from ..measure.cost import prefill as run_prefill
from ..measure.dense import decode_step, random_llama
from ..measure.machine import Machine
from ..measure.probes import Probes
from . import CLAIMS
from .base import ClaimResult

NAME = "kinetics-model-within-20-percent"
COMMON = {"head_dim": 64, "vocab_size": 8192}
LLAMAS: dict[str, dict[str, int]] = {
    "50M": {
        "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 10, "num_attention_heads": 10,
        "num_key_value_heads": 5,
    },
    "120M": {
        "hidden_size": 896, "intermediate_size": 2560, "num_hidden_layers": 14, "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "350M": {
        "hidden_size": 1152, "intermediate_size": 4096, "num_hidden_layers": 18, "num_attention_heads": 18,
        "num_key_value_heads": 6,
    },
}  # fmt: skip
DECODES = ((600, 1), (6000, 1), (24000, 1), (1500, 3), (6000, 6))  # context, batch
PREFILLS = ((400, 1), (1500, 1), (300, 3))  # tokens, batch
QUICK = ("50M", "120M")
ROUNDS, QUICK_ROUNDS = 5, 3
LIMIT = 0.2


class Case(NamedTuple):
    """One thing that is predicted and timed."""

    model: str
    kind: str
    tokens: int
    batch: int
    shape: Shape
    work: Work
    call: Callable[[], object]


def cases(models: dict[str, nn.Module], seed: int) -> list[Case]:
    """Every decode step and prefill of every model."""
    generator, found = torch.Generator().manual_seed(seed), []
    for name, model in models.items():
        shape = shape_of(model.config, name=name)
        for tokens, batch in DECODES:
            step = decode_step(model, tokens, batch=batch)
            found.append(Case(name, "decode", tokens, batch, shape, decode(shape, tokens, batch=batch), step))
        for tokens, batch in PREFILLS:
            ids = torch.randint(COMMON["vocab_size"], (batch, tokens), generator=generator)
            call = partial(run_prefill, model, ids)
            found.append(Case(name, "prefill", tokens, batch, shape, prefill(shape, tokens, batch=batch), call))
    return found


def roofline(work: Work, machine: Machine, dtype: str) -> float:
    """Seconds by the machine's limits alone."""
    num_bytes = work.linear.num_bytes + work.attention.num_bytes
    return max(work.flops / machine.of(dtype).arithmetic, num_bytes / machine.bandwidth)


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Time all cases and the machine in turns, then predict.

    Args:
        quick: two models and fewer rounds.
        seed: of weights, caches and prompts.
    """
    started = time.monotonic()
    names = [name for name in LLAMAS if not quick or name in QUICK]
    rounds = QUICK_ROUNDS if quick else ROUNDS
    context = max(tokens for tokens, _ in (*DECODES, *PREFILLS)) + 1
    models = {
        name: random_llama(torch.bfloat16, context=context, seed=seed, **COMMON, **LLAMAS[name]) for name in names
    }
    checked, probes = cases(models, seed), Probes(("bfloat16",))
    best = [math.inf] * len(checked)
    for turn in range(rounds + 1):
        probes.round()
        for index, case in enumerate(checked):
            begun = time.perf_counter()
            case.call()
            if turn:
                best[index] = min(best[index], time.perf_counter() - begun)
    machine = probes.machine()
    rows = [_row(case, seconds, machine) for case, seconds in zip(checked, best, strict=True)]
    errors = [abs(row["error"]) for row in rows]
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"median_error": "not stated"},
        measured={
            "median_error": statistics.median(errors),
            "worst_error": max(errors),
            "median_error_by_kind": {
                kind: statistics.median(abs(row["error"]) for row in rows if row["kind"] == kind)
                for kind in ("decode", "prefill")
            },
            "median_error_of_roofline": statistics.median(abs(row["roofline_error"]) for row in rows),
            "cases": rows,
            "machine": machine.model_dump(mode="json"),
        },
        holds=statistics.median(errors) <= LIMIT,
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "llamas": {name: COMMON | LLAMAS[name] for name in names},
            "rounds": rounds,
            "dtype": "bfloat16",
            "limit": LIMIT,
        },
    )


def _row(case: Case, seconds: float, machine: Machine) -> dict[str, Any]:
    predicted = predict(case.shape, case.work, machine)
    return {
        "model": case.model,
        "kind": case.kind,
        "tokens": case.tokens,
        "batch": case.batch,
        "ms": 1e3 * seconds,
        "predicted_ms": 1e3 * predicted.total,
        "error": predicted.total / seconds - 1,
        "roofline_error": roofline(case.work, machine, case.shape.dtype) / seconds - 1,
        "parts_ms": {part: 1e3 * getattr(predicted, part) for part in ("linear", "attention", "moved", "calls")},
    }
