"""The figures of a report: each a function of the report, or None where it has no data."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import units
from .schema import Report, Retrieval
from .svg import INK, canvas, label, to_svg

MAX_KINDS = 32
_LAYER = re.compile(r"(?:(?P<stem>.*?)\.)?(?P<layer>\d+)\.(?P<kind>.+)")


@dataclass(frozen=True)
class Picture:
    """A figure for the page: ``svg`` carries ``alt`` as its label; ``key`` asks for the dense/sparse legend."""

    name: str
    title: str
    svg: str
    caption: str
    key: bool = False


def pictures(report: Report) -> list[Picture]:
    """Every figure that the report has data for."""
    made = (quality_against_cost, prefill_by_length, density_by_layer, retrieval, density_by_head)
    return [picture for picture in (make(report) for make in made) if picture is not None]


def quality_against_cost(report: Report) -> Picture | None:
    """Bits per byte against prefill time, dense and sparse, with their intervals."""
    both = (("dense", report.dense), ("sparse", report.sparse))
    if not all(_finite(model.prefill_ms, model.bits_per_byte) for _, model in both):
        return None
    with canvas(3.2) as figure:
        axes = figure.add_subplot()
        points: list[tuple[float, float]] = []
        for name, model in both:
            x, y = model.prefill_ms or 0.0, model.bits_per_byte or 0.0
            points.append((x, y))
            across = _reach(x, model.prefill_ms_low, model.prefill_ms_high)
            along = _reach(y, model.bits_per_byte_low, model.bits_per_byte_high)
            style = {"color": INK[name], "markersize": 7.5, "elinewidth": 1.3, "capsize": 3}
            axes.errorbar([x], [y], xerr=across, yerr=along, fmt="o" if name == "dense" else "D", **style)
            upper = "sparse" if (report.sparse.bits_per_byte or 0.0) >= (report.dense.bits_per_byte or 0.0) else "dense"
            beside = (9, 7) if name == upper else (9, -14)  # away from the arrow between the two
            axes.annotate(name, (x, y), beside, textcoords="offset points", color=INK[name], weight="bold", fontsize=10)
        arrow = {"arrowstyle": "->", "color": INK["muted"], "linewidth": 0.9, "shrinkA": 9, "shrinkB": 9}
        axes.annotate("", points[1], points[0], arrowprops=arrow)
        axes.margins(0.35)
        axes.locator_params(nbins=5, steps=[1, 2, 2.5, 5, 10])
        size = f" of {units.count(report.sparse.prefill_tokens)} tokens" if report.sparse.prefill_tokens else ""
        axes.set_xlabel(f"prefill{size}, ms   (left is faster)")
        axes.set_ylabel("bits per byte   (lower is better)")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.grid(True)
        said = (f"{n} {units.fixed(m.bits_per_byte)} bits per byte at {units.ms(m.prefill_ms)}" for n, m in both)
        alt = f"Scatter of quality against cost: {'; '.join(said)}."
        svg = to_svg(figure, "quality", alt)
    caption = "Axes do not start at zero. Bars: the range of the rounds across, the 95 % interval of the text upwards."
    return Picture("quality", "Quality against cost", svg, caption)


def prefill_by_length(report: Report) -> Picture | None:
    """Prefill time against prompt length; None with fewer than two lengths."""
    both = (("dense", report.dense), ("sparse", report.sparse))
    if any(len(model.prefill_ms_by_length) < 2 for _, model in both):
        return None
    with canvas(2.9) as figure:
        axes = figure.add_subplot()
        for name, model in both:
            series = sorted(model.prefill_ms_by_length, key=lambda entry: entry.tokens)
            lengths, times = [entry.tokens for entry in series], [entry.ms for entry in series]
            axes.plot(lengths, times, color=INK[name], marker="o" if name == "dense" else "D", markersize=5)
            for entry in series:
                reach = _reach(entry.ms, entry.low, entry.high)
                axes.errorbar([entry.tokens], [entry.ms], yerr=reach, color=INK[name], capsize=3)
        axes.set_xticks(lengths, [units.count(length) for length in lengths])
        _thin(axes)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="y", nbins=5)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set_xlabel("prompt, tokens")
        axes.set_ylabel("prefill, ms")
        axes.grid(True, axis="y")
        ends = (f"{name} {units.ms(model.prefill_ms_by_length[-1].ms)}" for name, model in both)
        svg = to_svg(figure, "lengths", f"Prefill time by prompt length; at the last length {', '.join(ends)}.")
    return Picture(
        "lengths",
        "Prefill time by prompt length",
        svg,
        "Medians, with the range of the rounds; lower is faster.",
        key=True,
    )


def retrieval(report: Report) -> Picture | None:
    """Accuracy by task and length as pairs of bars with their intervals."""
    found: dict[tuple[str, int], list[Retrieval | None]] = {}
    for side, model in enumerate((report.dense, report.sparse)):
        for entry in model.retrieval:
            found.setdefault((entry.task, entry.length), [None, None])[side] = entry
    if not found:
        return None
    tasks = dict.fromkeys(task for task, _ in found)
    ticks, y = {}, 0.0
    with canvas(0.55 + 0.26 * len(tasks) + 0.36 * len(found)) as figure:
        axes = figure.add_subplot()
        for task in tasks:
            axes.text(0, y, label(task.replace("_", " "), 40), weight="bold", va="center")
            y += 0.85
            for length in sorted(size for name, size in found if name == task):
                pair = found[task, length]
                for one, name, shift in zip(pair, ("dense", "sparse"), (-0.19, 0.19), strict=True):
                    if one is not None and _finite(one.accuracy):
                        axes.barh(y + shift, one.accuracy, 0.34, color=INK[name])
                        reach = _reach(one.accuracy, one.low, one.high)
                        for color, line_width in ((INK["card"], 2.4), (INK["ink"], 1.0)):
                            axes.errorbar([one.accuracy], [y + shift], xerr=reach, color=color, elinewidth=line_width)
                shown = " → ".join(units.percent(e.accuracy, 0) for e in pair if e).replace(" % →", " →")
                axes.text(1.035, y, shown, va="center", color=INK["muted"], fontsize=8.5)
                ticks[y] = units.count(length)
                y += 1
            y += 0.15
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.set_ylim(y - 0.45, -0.5)
        axes.set_xlim(0, 1.27)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.tick_params(axis="y", length=0)
        axes.spines["bottom"].set_visible(False)
        axes.grid(True, axis="x")
        svg = to_svg(figure, "retrieval", f"Retrieval accuracy, dense and sparse, for {units.listed(list(tasks))}.")
    prompts = sorted({entry.num_prompts for entry in report.sparse.retrieval})
    of = f", over {units.listed([units.count(n) for n in prompts])} prompts each" if prompts else ""
    caption = f"Share of answers retrieved exactly, by prompt length in tokens{of}. Thin lines are 95 % intervals."
    return Picture("retrieval", "Retrieval from context", svg, caption, key=True)


def density_by_layer(report: Report) -> Picture | None:
    """Achieved density of the sparse sites, kinds x layers; sites outside numbered layers are left to the table."""
    cells, kinds, layers = _by_layer(report.sparse.density)
    if not cells:
        return None
    shown = kinds[:MAX_KINDS]
    grid = [[cells.get((kind, layer)) for layer in layers] for kind in shown]
    svg = _heat(
        grid,
        "layers",
        columns=[str(layer) for layer in layers],
        rows=[label(kind) for kind in shown],
        axes_names=("layer", ""),
        alt=f"Density by layer for {len(kinds)} kinds of site in {len(layers)} layers: {_range(grid)}.",
    )
    left = f" The first {MAX_KINDS} of {len(kinds)} kinds; all are in the table below." if kinds != shown else ""
    caption = f"What share of each site is kept, in per cent: {_range(grid)}.{left}"
    return Picture("layers", "Density by layer", svg, caption)


def density_by_head(report: Report) -> Picture | None:
    """Attention density, layers x heads."""
    grid = report.head_density or []
    if not any(_finite(value) for row in grid for value in row):
        return None
    svg = _heat(
        grid,
        "heads",
        columns=[str(head) for head in range(len(grid[0]))],
        rows=[str(layer) for layer in range(len(grid))],
        axes_names=("head", "layer"),
        alt=f"Attention density of {len(grid)} layers with {len(grid[0])} heads each: {_range(grid)}.",
    )
    caption = f"What share of the causal query–key pairs each head computed, in per cent: {_range(grid)}."
    return Picture("heads", "Attention density by head", svg, caption)


def _heat(
    grid: Sequence[Sequence[float | None]],
    name: str,
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    axes_names: tuple[str, str],
    alt: str,
) -> str:
    """Cells of one colour whose opacity is the density, from 0 to 1, under a colour bar; None is a dash."""
    from matplotlib.collections import PolyCollection

    def cell(x: float, y: float, wide: float, high: float) -> list[tuple[float, float]]:
        return [(x, y), (x + wide, y), (x + wide, y + high), (x, y + high)]

    def paint(target: Any, boxes: list[Any], values: Iterable[float]) -> None:
        colors = [(*_rgb(INK["heat"]), round(min(max(value, 0.0), 1.0), 3)) for value in values]
        target.add_collection(PolyCollection(boxes, facecolors=colors, edgecolors="none", antialiased=False))

    known = {(x, y): v for y, row in enumerate(grid) for x, v in enumerate(row) if v is not None and _finite(v)}
    row_height = 0.27 if len(rows) <= 16 else max(0.09, 4.3 / len(rows))
    with canvas(0.95 + row_height * len(rows)) as figure:
        bar, axes = figure.subplots(2, 1, gridspec_kw={"height_ratios": [0.13, row_height * len(rows)]})
        gap = 0.04 if len(columns) <= 40 and len(rows) <= 40 else 0.0
        boxes = [cell(x + gap / 2, y + gap / 2, 1 - gap, 1 - gap) for x, y in known]
        paint(axes, boxes, known.values())
        for y, row in enumerate(grid):
            for x in range(len(row)):
                if (x, y) not in known:
                    axes.plot([x + 0.4, x + 0.6], [y + 0.5] * 2, color=INK["muted"], linewidth=0.8)
        if len(columns) <= 12 and len(rows) <= MAX_KINDS:
            for (x, y), value in known.items():
                text = units.percent(value, 0)[:-2]
                axes.text(x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=8)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks([x + 0.5 for x in range(len(columns))], columns)
        axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
        _thin(axes)
        axes.set_xlabel(axes_names[0])
        axes.set_ylabel(axes_names[1])
        paint(bar, [cell(i / 20 + 0.002, 0, 0.046, 1) for i in range(20)], [(i + 0.5) / 20 for i in range(20)])
        bar.set_xlim(0, 1)
        bar.set_ylim(0, 1)
        bar.set_yticks([])
        bar.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        bar.set_ylabel("kept, %", rotation=0, ha="right", va="center")
        bar.xaxis.tick_top()
        for part in (axes, bar):
            part.tick_params(length=0)
            part.spines[:].set_visible(False)
        return to_svg(figure, name, alt)


def _by_layer(density: dict[str, float]) -> tuple[dict[tuple[str, int], float], list[str], list[int]]:
    """Density by (kind, layer), with the kinds in the order of their first site and the layers in theirs."""
    parsed = {name: match for name in density if (match := _LAYER.fullmatch(name))}
    stems = {match["stem"] for match in parsed.values()}
    cells = {}
    for name, match in parsed.items():
        kind = match["kind"].removesuffix(".weight")
        if len(stems) > 1 and match["stem"]:
            kind = f"{match['stem']}.*.{kind}"
        cells[kind, int(match["layer"])] = density[name]
    cells = {key: value for key, value in cells.items() if _finite(value)}
    return cells, list(dict.fromkeys(kind for kind, _ in cells)), sorted({layer for _, layer in cells})


def _range(grid: Iterable[Iterable[float | None]]) -> str:
    values = [value for row in grid for value in row if value is not None and _finite(value)]
    return f"{units.percent(min(values))} to {units.percent(max(values))}"


def _thin(axes: Any, limit: int = 12) -> None:
    """Keep every n-th tick, so that their labels do not touch."""
    for axis in (axes.xaxis, axes.yaxis):
        ticks, texts = axis.get_ticklocs(), [text.get_text() for text in axis.get_ticklabels()]
        step = math.ceil(len(ticks) / (limit if axis is axes.xaxis else 40))
        if step > 1:
            axis.set_ticks(ticks[::step], texts[::step])


def _rgb(color: str) -> tuple[float, float, float]:
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def _finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _reach(middle: float, low: float | None, high: float | None) -> list[list[float]] | None:
    """Error bars around ``middle``; None without an interval."""
    if low is None or high is None or not _finite(middle, low, high):
        return None
    return [[max(middle - low, 0.0)], [max(high - middle, 0.0)]]
