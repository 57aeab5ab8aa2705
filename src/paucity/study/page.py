"""study.html: one self-contained file in the style of a report."""

from typing import Any

from ..report.page import templates
from ..report.units import DASH, change, fixed, percent
from .figures import cost_figure, frontier, styles
from .methods import Phase
from .plan import DENSE
from .results import ALL_TASKS, Result, Row
from .verdict import KEPT, NAMES, SLACK, leaders, within_work

WORK = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the dense model's operations that the isoFLOPS table asks for."""


def render(result: Result) -> str:
    """The page as HTML; every string of the result is escaped, and a section without data is left out."""
    phases: list[Phase] = list(dict.fromkeys(row.phase for row in result.rows))
    return (
        templates("paucity.study", "paucity.report")
        .get_template("study.html.j2")
        .render(
            result=result,
            sections=[_section(result, phase) for phase in phases],
            budgets=[percent(budget) for budget in sorted(result.plan["budgets"])],
            kept=percent(KEPT, 0),
            slack=percent(SLACK - 1, 0),
            num_prompts=max(row.num_prompts for row in result.rows if row.task != ALL_TASKS),
        )
    )


def _section(result: Result, phase: Phase) -> dict[str, Any]:
    """Everything of one phase."""
    look = styles(result)
    mine = {row.method for row in result.rows if row.phase == phase}
    lengths = sorted({row.length for row in result.rows if row.phase == phase})
    costs = [cost_figure(result, phase, n, measure) for n in lengths for measure in ("work", "time")]
    return {
        "phase": phase,
        "name": NAMES[phase],
        "methods": [(name, style) for name, style in _keys(look).items() if name in mine],
        "pictures": [frontier(result, phase, *key) for key in result.tasks(phase)],
        "costs": [picture for picture in costs if picture is not None],
        "best": [_best(result, phase, task, length) for task, length in result.tasks(phase)],
        "work": [percent(share, 0) for share in WORK],
        "equal_work": [table for n in lengths if (table := _equal_work(result, phase, n))["rows"]],
        "rows": [_cells(row) for row in result.rows if row.phase == phase],
        "cost_rows": [
            [
                cost.method,
                f"{cost.length:,}",
                percent(cost.budget),
                percent(cost.density),
                percent(cost.work),
                f"{1e3 * cost.dense_seconds:.1f} ms",
                f"{1e3 * cost.seconds:.1f} ms",
                percent(cost.time, 0),
                DASH if cost.select_seconds is None else percent(cost.select_seconds / cost.seconds),
            ]
            for cost in result.costs
            if cost.phase == phase
        ],
    }


def _keys(look: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """CSS colour and dash pattern of each method, for the legend."""
    dashes = {"-": "", "--": "5 3", ":": "1.5 3"}
    return {
        name: {"color": f"var(--series-{i % 8})", "dash": dashes[style["linestyle"]]}
        for i, (name, style) in enumerate(look.items())
    }


def _best(result: Result, phase: Phase, task: str, length: int) -> dict[str, Any]:
    """Who leads on a task at each bound on the density, beside dense."""
    (dense,) = (row for row in result.of(phase, task, length) if row.method == DENSE)
    cells = []
    for bound in sorted(result.plan["budgets"]):
        best = leaders(result, phase, task, length, bound)
        if best:
            names = ", ".join(row.method for row in best[:2]) + (f" and {len(best) - 2} more" if len(best) > 2 else "")
            cells.append((names, f"{_value(best[0])}, reads {percent(best[0].density)}"))
        else:
            cells.append((DASH, "none reads so little"))
    telling = result.telling(phase, task, length)
    return {"task": task, "length": length, "dense": _value(dense), "cells": cells, "telling": telling}


def _equal_work(result: Result, phase: Phase, length: int) -> dict[str, Any]:
    """The best mean quality of each method within each share of the dense model's work."""
    found = [within_work(result, phase, length, share) for share in WORK]
    names = list(dict.fromkeys(name for column in found for name in column))
    tops = [max((row.gain for row, _ in column.values()), default=None) for column in found]
    rows = [
        (
            name,
            [
                (_value(column[name][0]), column[name][0].gain == top) if name in column else (DASH, False)
                for column, top in zip(found, tops, strict=True)
            ],
        )
        for name in names
    ]
    return {"length": length, "rows": rows}


def _value(row: Row) -> str:
    return percent(row.value, 0) if row.is_accuracy else fixed(row.value)


def _cells(row: Row) -> list[str]:
    """A row of the table of every number."""
    low_high = DASH
    if row.low is not None and row.high is not None:
        ends = (
            (percent(row.low, 0)[:-2], percent(row.high, 0)) if row.is_accuracy else (fixed(row.low), fixed(row.high))
        )
        low_high = f"{ends[0]}{DASH}{ends[1]}"
    moved = within = DASH
    if row.method != DENSE:
        unit = "points" if row.is_accuracy else "%"
        moved = change(row.change, unit)
        if row.change_low is not None and row.change_high is not None:
            within = f"{change(row.change_low, '').strip()} to {change(row.change_high, unit)}"
    left = sum(row.dense_texts.values())
    return [
        row.method,
        row.task,
        f"{row.length:,}",
        percent(row.budget),
        percent(row.density) + (f" ({left:,} left dense)" if left else ""),
        _value(row),
        low_high,
        moved,
        within,
    ]
