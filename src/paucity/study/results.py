"""What a study found: a row for each frontier point, with intervals, differences from dense and costs."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..measure.stats import Estimate, ratio_interval, share_change, share_interval
from ..report import Environment, ModelFacts
from .methods import Phase
from .plan import COST, DENSE, PERPLEXITY, Cell, Study

FLOOR = 0.2
"""A task of which the dense model gets less than this tells nothing of what sparsity loses."""
ALL_TASKS = "mean of the tasks"


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Data):
    """One method at one budget on one task, seeds pooled; the dense model has budget 1.

    ``value`` is accuracy, higher is better, or bits per byte, lower is better. ``change`` is that from the dense model
    on the same prompts: a difference of accuracies, or a relative change of bits. Intervals are of 95 %.
    """

    phase: Phase
    method: str
    task: str
    length: int
    budget: float
    density: float
    value: float
    low: float | None
    high: float | None
    change: float
    change_low: float | None
    change_high: float | None
    num_prompts: int
    dense_texts: dict[str, int] = {}

    @property
    def is_accuracy(self) -> bool:
        """Whether a higher value is better."""
        return self.task != PERPLEXITY

    @property
    def gain(self) -> float:
        """The value, turned so that more is better."""
        return self.value if self.is_accuracy else -self.value

    @property
    def within_noise(self) -> bool:
        """Whether the interval of the change holds no change."""
        return self.change_low is None or self.change_high is None or self.change_low <= 0 <= self.change_high


class CostRow(_Data):
    """Work and time of the whole model: of a prefill of ``length`` tokens, or of one token decoded after it."""

    phase: Phase
    method: str
    length: int
    budget: float
    density: float
    flops: float
    dense_flops: float
    seconds: float
    dense_seconds: float
    select_seconds: float | None = None

    @property
    def work(self) -> float:
        """Share of the dense model's operations."""
        return self.flops / self.dense_flops

    @property
    def time(self) -> float:
        """Share of the dense model's time."""
        return self.seconds / self.dense_seconds


class Result(_Data):
    """``study.json``."""

    title: str
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))
    seconds: float
    plan: dict[str, Any]
    environment: Environment
    model: ModelFacts
    rows: list[Row]
    costs: list[CostRow]
    verdict: list[str] = []

    def of(self, phase: Phase, task: str, length: int) -> list[Row]:
        """The rows of one frontier figure, dense first."""
        return [row for row in self.rows if (row.phase, row.task, row.length) == (phase, task, length)]

    def tasks(self, phase: Phase) -> list[tuple[str, int]]:
        """Tasks and lengths that a phase was measured on, the mean of the tasks last."""
        found = dict.fromkeys((row.task, row.length) for row in self.rows if row.phase == phase)
        return sorted(found, key=lambda key: key[0] == ALL_TASKS)

    def telling(self, phase: Phase, task: str, length: int) -> bool:
        """Whether the dense model does the task well enough that something can be lost."""
        (dense,) = (row for row in self.of(phase, task, length) if row.method == DENSE)
        return not dense.is_accuracy or dense.value >= FLOOR


def summarize(plan: Study, kept: Mapping[Cell, Mapping[str, Any]]) -> tuple[list[Row], list[CostRow]]:
    """Rows and costs of what the cells of ``plan`` hold."""
    pooled: dict[tuple[Phase, str, float, str, int], list[Mapping[str, Any]]] = {}
    costs = []
    for cell, found in kept.items():
        if cell.task == COST:
            figures = {name: value for name, value in found.items() if name != "dense"}
            at = {"phase": cell.phase, "method": cell.line, "length": cell.length, "budget": cell.budget}
            costs.append(CostRow(**at, **figures))
        else:
            pooled.setdefault((cell.phase, cell.line, cell.budget, cell.task, cell.length), []).append(found)
    rows = []
    for (phase, line, budget, task, length), cells in pooled.items():
        dense = pooled[phase, DENSE, 1.0, task, length]
        rows.append(_row(phase, line, budget, task, length, cells, dense))
    return rows + _means(plan, rows, pooled), costs


def _row(
    phase: Phase, line: str, budget: float, task: str, length: int, cells: Sequence[Any], dense: Sequence[Any]
) -> Row:
    if task == PERPLEXITY:
        nats, base = (_joined(side, "nats") for side in (cells, dense))
        per_nat = len(nats) / math.log(2) / sum(cell["bytes"] for cell in cells)
        value = ratio_interval(nats, [1.0] * len(nats)).mapped(lambda mean: mean * per_nat)
        change = ratio_interval(nats, base).mapped(lambda ratio: ratio - 1)
    else:
        nats = _joined(cells, "scores")
        value, change = share_interval(nats), share_change(nats, _joined(dense, "scores"))
    return _as_row(phase, line, budget, task, length, cells, value, change)


def _as_row(
    phase: Phase,
    line: str,
    budget: float,
    task: str,
    length: int,
    cells: Sequence[Any],
    value: Estimate,
    change: Estimate,
) -> Row:
    reasons: dict[str, int] = {}
    for cell in cells:
        for reason, count in cell["dense"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    return Row(
        phase=phase,
        method=line,
        task=task,
        length=length,
        budget=budget,
        density=sum(cell["density"] for cell in cells) / len(cells),
        value=value.value,
        low=value.low,
        high=value.high,
        change=change.value,
        change_low=change.low,
        change_high=change.high,
        num_prompts=value.num_samples,
        dense_texts=reasons,
    )


def _means(plan: Study, rows: Sequence[Row], pooled: Mapping[Any, Sequence[Any]]) -> list[Row]:
    """All prompts of the tasks that the dense model can do, taken together, for each method, budget and length."""
    found = []
    dense = {(row.phase, row.task, row.length): row.value for row in rows if row.method == DENSE}
    for phase in plan.phases:
        for length in sorted(set(plan.lengths)):
            tasks = [t for t in plan.tasks if t != PERPLEXITY and dense[phase, t, length] >= FLOOR]
            lines = [(DENSE, 1.0), *((line.label, b) for line in plan.lines(phase) for b in plan.budgets)]
            for line, budget in lines if len(tasks) > 1 else ():
                cells, base = (
                    [cell for task in tasks for cell in pooled[phase, *who, task, length]]
                    for who in ((line, budget), (DENSE, 1.0))
                )
                scores = _joined(cells, "scores")
                change = share_change(scores, _joined(base, "scores"))
                found.append(_as_row(phase, line, budget, ALL_TASKS, length, cells, share_interval(scores), change))
    return found


def _joined(cells: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [value for cell in cells for value in cell[name]]
