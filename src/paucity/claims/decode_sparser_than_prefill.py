"""Claim: decoding bears more sparsity than prefill at equal quality.

Paper: Nawrot et al. 2025 (The Sparse Frontier), https://arxiv.org/abs/2504.17768, Sec. 5: at quality preserved, higher
sparsity is reached in decoding than in prefilling. Methods of either phase run at several budgets on the same tasks;
prefill is judged in one sparse pass over prompt and answer, decoding after a dense prefill, the question included, so
that only generated tokens are sparse. A setting is tolerated where it keeps 95 % of the dense accuracy on every task.

Holds when the sparsest setting that is tolerated in decoding reads a smaller share of the keys than the sparsest one in
prefill does of the pairs, and so does the median of the methods (one that tolerates no budget counts as dense). The
paper has models of 7 to 72 B parameters at up to 128k tokens, and tests nine tasks.
"""

import statistics
import time
from typing import Any

from ..measure.data import held_out_python
from ..models.load import Loaded, load
from ..study.methods import PHASES, Phase
from ..study.plan import DENSE, Study
from ..study.results import Row, summarize
from ..study.verdict import KEPT, sparsest
from ..study.worker import Worker
from . import CLAIMS
from .base import ClaimResult

NAME = "decode-sparser-than-prefill"
METHODS: dict[Phase, tuple[str, ...]] = {
    "prefill": ("vertical_slash", "block_topk", "hierarchical"),
    "decode": ("quest", "block_topk_decode", "snapkv"),
}
TASKS = ("key_value", "multi_value")
BUDGETS, QUICK_BUDGETS = (0.05, 0.1, 0.2, 0.4), (0.05, 0.2)  # the paper goes down to 0.05
LENGTH, QUICK_LENGTH = 2048, 1024
NUM_PROMPTS, QUICK_PROMPTS = 10, 4
QUICK_METHODS = 2


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Measure the frontiers of both phases and compare the sparsest settings that are tolerated.

    Args:
        quick: fewer methods, budgets and prompts, shorter ones.
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
        tasks=TASKS,
        budgets=QUICK_BUDGETS if quick else BUDGETS,
        lengths=(length,),
        num_prompts=num_prompts,
        seeds=1,
        repeats=0,
    )
    worker = Worker(plan, loaded, held_out_python())
    rows, _ = summarize(plan, {cell: worker.measure(cell, seed=seed) for cell in plan.cells()})
    found: dict[str, dict[str, Any]] = {}
    for phase in PHASES:
        mine = [row for row in rows if row.phase == phase and row.task in TASKS]
        tolerated = {one.method: one.density for one in sparsest(mine)}
        densities = [tolerated.get(name, 1.0) for name in methods[phase]]
        found[phase] = {
            "sparsest_tolerated": min(densities),
            "median_of_methods": statistics.median(densities),
            "by_method": dict(zip(methods[phase], densities, strict=True)),
            "frontier": [_point(row) for row in mine],
        }
    decode, prefill = found["decode"], found["prefill"]
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"sparsity at preserved accuracy": "higher in decoding than in prefilling"},
        measured=found,
        holds=all(decode[name] < prefill[name] for name in ("sparsest_tolerated", "median_of_methods")),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={"model": loaded.source, "tasks": TASKS, "length": length, "num_prompts": num_prompts, "kept": KEPT},
    )


def _point(row: Row) -> dict[str, Any]:
    name = row.method if row.method == DENSE else f"{row.method} at {row.budget:g}"
    return {"setting": name, "task": row.task, "density": row.density, "accuracy": row.value, "low": row.low}
