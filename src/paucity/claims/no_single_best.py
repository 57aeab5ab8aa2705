"""Claim: no sparse attention method is best on all tasks and in both phases.

Paper: Nawrot et al. 2025 (The Sparse Frontier), https://arxiv.org/abs/2504.17768, Sec. 5 and abstract: no strategy
performs best across tasks and phases. Methods run at the same budgets on the same prompts. One is beaten on a task at a
budget where another one of its phase, which reads at most a fifth more, is better beyond the noise: a 99 % interval of
the paired difference holds no difference.

Holds when in each phase every method is beaten somewhere. The tasks are retrieval from context, copying and bits per
byte; the paper has nine tasks, models of 7 to 72 B parameters and up to 128k tokens.
"""

import time
from collections.abc import Mapping
from typing import Any

from ..measure.data import held_out_python
from ..measure.stats import ratio_interval, share_change
from ..models.load import Loaded, load
from ..study.methods import PHASES, Phase
from ..study.plan import DENSE, PERPLEXITY, Cell, Study
from ..study.verdict import SLACK
from ..study.worker import Worker
from . import CLAIMS
from .base import ClaimResult

NAME = "no-single-best"
METHODS: dict[Phase, tuple[str, ...]] = {
    "prefill": ("vertical_slash", "tri_shape", "block_topk", "hierarchical"),
    "decode": ("quest", "snapkv", "streaming_decode", "knorm"),
}
TASKS, QUICK_TASKS = ("key_value", "multi_value", "copying", PERPLEXITY), ("copying", PERPLEXITY)
BUDGETS, QUICK_BUDGETS = (0.03, 0.1), (0.05,)
LENGTH, QUICK_LENGTH = 2048, 1024
NUM_PROMPTS, QUICK_PROMPTS = 8, 6
QUICK_METHODS = 3
CONFIDENCE = 0.99


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Measure every method at every budget and look for one that is never beaten.

    Args:
        quick: fewer methods, tasks, budgets and prompts, shorter ones.
        seed: of the prompts.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    length, num_prompts = (QUICK_LENGTH, QUICK_PROMPTS) if quick else (LENGTH, NUM_PROMPTS)
    methods = {phase: METHODS[phase][: QUICK_METHODS if quick else None] for phase in PHASES}
    plan = Study.build(
        model=loaded.source,
        methods=[name for names in methods.values() for name in names],
        tasks=QUICK_TASKS if quick else TASKS,
        budgets=QUICK_BUDGETS if quick else BUDGETS,
        lengths=(length,),
        num_prompts=num_prompts,
        seeds=1,
        repeats=0,
    )
    worker = Worker(plan, loaded, held_out_python())
    kept = {cell: worker.measure(cell, seed=seed) for cell in plan.cells() if cell.line != DENSE}
    beaten: dict[str, dict[str, list[str]]] = {phase: {name: [] for name in names} for phase, names in methods.items()}
    for cell, mine in kept.items():
        for other, theirs in kept.items():
            same = (other.phase, other.task, other.budget) == (cell.phase, cell.task, cell.budget)
            if same and theirs["density"] <= SLACK * mine["density"] and better(theirs, mine):
                beaten[cell.phase][cell.line].append(f"{cell.task} at {cell.budget:g} by {other.line}")
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"best method": "another one by task and phase"},
        measured={"beaten": beaten, "points": [_point(cell, found) for cell, found in kept.items()]},
        holds=all(where for names in beaten.values() for where in names.values()),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "tasks": plan.tasks,
            "budgets": plan.budgets,
            "length": length,
            "num_prompts": num_prompts,
            "confidence": CONFIDENCE,
        },
    )


def better(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether ``one`` is better than ``other`` on the same prompts, beyond the noise; both are what a cell holds."""
    if "nats" in one:
        high = ratio_interval(one["nats"], other["nats"], confidence=CONFIDENCE).high
        return high is not None and high < 1
    low = share_change(one["scores"], other["scores"], confidence=CONFIDENCE).low
    return low is not None and low > 0


def _point(cell: Cell, found: Mapping[str, Any]) -> dict[str, Any]:
    values = found.get("scores") or found["nats"]
    return {
        "method": cell.line,
        "task": cell.task,
        "budget": cell.budget,
        "density": found["density"],
        "nats per window" if "nats" in found else "accuracy": sum(values) / len(values),
    }
