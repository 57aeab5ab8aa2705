"""The frontiers of a study as figures: quality against what is read, and against what it costs."""

import math
from collections.abc import Sequence
from typing import Any

from ..report.figures import Picture
from ..report.svg import INK, canvas, label, to_svg
from ..report.units import count, percent
from .methods import Phase
from .plan import DENSE
from .results import ALL_TASKS, CostRow, Result, Row
from .verdict import READ

MARKERS = "oDs^vPX*"
DASHES = ("-", "--", ":")


def styles(result: Result) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash of each method, the same in every figure and in both phases."""
    methods = list(dict.fromkeys(row.method for row in result.rows if row.method != DENSE))
    return {
        method: {
            "color": INK[f"series-{i % 8}"],
            "marker": MARKERS[i % 8],
            "linestyle": DASHES[i // 8 % 3],
        }
        for i, method in enumerate(methods)
    }


def frontier(result: Result, phase: Phase, task: str, length: int) -> Picture:
    """Quality against achieved density, a line with its interval for each method, dense across.

    Rows without a density, where nothing was read by the policy, are left out.
    """
    (dense,) = (row for row in result.of(phase, task, length) if row.method == DENSE)
    rows = [row for row in result.of(phase, task, length) if math.isfinite(row.density)]
    rows.sort(key=lambda row: row.density)
    look = styles(result)
    with canvas(2.75) as figure:
        axes = figure.add_subplot()
        axes.set_xscale("log")
        _dense_line(axes, dense)
        for method in look:
            mine = [row for row in rows if row.method == method]
            if not mine:
                continue
            x = [row.density for row in mine]
            axes.plot(x, [row.value for row in mine], **look[method], markersize=4.5, linewidth=1.4)
            if all(row.low is not None for row in mine) and len(mine) > 1:
                bounds = ([row.low for row in mine], [row.high for row in mine])
                axes.fill_between(x, *bounds, color=look[method]["color"], alpha=0.08, linewidth=0)
        _axis(axes, [row.density for row in rows if row.method != DENSE] or [1.0])
        _quality(axes, rows)
        axes.set_xlabel(f"share {READ[phase]} that is read")
        title = label(task.replace("_", " "), 40)
        best = max((row for row in rows if row.method != DENSE), key=lambda row: row.gain, default=dense)
        alt = f"{title} in {phase} against density; dense {_value(dense)}, the best {best.method} {_value(best)}."
        svg = to_svg(figure, f"{phase}-{task.replace(' ', '-').replace(':', '-')}-{length}", alt)
    caption = f"Prompts of {count(length)} tokens. Bands: 95 % intervals; grey: dense."
    return Picture(f"{phase}-{task}-{length}", title, svg, caption)


def cost_figure(result: Result, phase: Phase, length: int, measure: str) -> Picture | None:
    """Mean quality against the share of the dense model's ``"time"`` or ``"work"``; None where it was not measured."""
    rows = {(row.method, row.budget): row for row in result.of(phase, ALL_TASKS, length)}
    costs = [cost for cost in result.costs if (cost.phase, cost.length) == (phase, length)]
    costs = [cost for cost in costs if (cost.method, cost.budget) in rows]
    if not costs:
        return None
    dense = rows[DENSE, 1.0]
    look = styles(result)
    with canvas(2.75) as figure:
        axes = figure.add_subplot()
        _dense_line(axes, dense)
        axes.axvline(1, color=INK["dense"], linewidth=1, linestyle=(0, (4, 3)))
        for method in look:
            mine = sorted((cost for cost in costs if cost.method == method), key=lambda cost: cost.budget)
            x = [getattr(cost, measure) for cost in mine]
            axes.plot(x, [rows[method, cost.budget].value for cost in mine], **look[method], markersize=4.5)
        _quality(axes, list(rows.values()))
        axes.margins(x=0.06)
        axes.xaxis.set_major_formatter(lambda value, _: percent(value, 0))
        axes.locator_params(axis="x", nbins=6)
        what = {"time": "time", "work": "operations"}[measure]
        axes.set_xlabel(f"{what}, selection included, as a share of dense")
        svg = to_svg(figure, f"{phase}-{measure}-{length}", f"Mean accuracy in {phase} against {what}: {_said(costs)}.")
    unit = "a prefill" if phase == "prefill" else "a token decoded after a prompt"
    caption = f"The whole model, {unit} of {count(length)} tokens; mean accuracy over the tasks. Upright: dense."
    return Picture(f"{phase}-{measure}-{length}", f"Accuracy against {what}", svg, caption)


def _said(costs: Sequence[CostRow]) -> str:
    fastest = min(costs, key=lambda cost: cost.time)
    return f"the fastest is {fastest.method} with {percent(fastest.time, 0)} of the dense time"


def _dense_line(axes: Any, dense: Row) -> None:
    axes.axhline(dense.value, color=INK["dense"], linewidth=1.2, linestyle=(0, (4, 3)))
    if dense.low is not None and dense.high is not None:
        axes.axhspan(dense.low, dense.high, color=INK["dense"], alpha=0.08, linewidth=0)


def _axis(axes: Any, densities: Sequence[float]) -> None:
    """Ticks of a logarithmic axis at round shares."""
    low, high = min(densities) / 1.2, max(densities) * 1.2
    ticks = [t for t in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if low <= t <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [percent(tick) for tick in ticks])
    axes.minorticks_off()


def _quality(axes: Any, rows: Sequence[Row]) -> None:
    axes.grid(True)
    if rows[0].is_accuracy:
        axes.set_ylim(-0.04, 1.04)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.set_ylabel("accuracy")
    else:
        axes.locator_params(axis="y", nbins=5)
        axes.set_ylabel("bits per byte   (lower is better)")


def _value(row: Row) -> str:
    return percent(row.value) if row.is_accuracy else f"{row.value:.3f} bits per byte"
