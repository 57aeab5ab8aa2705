"""The section "What perplexity hides": rows, a figure and every number of the abilities."""

import math
from collections.abc import Callable

from . import units
from .ability import Ability, Figure
from .compare import Judgement, Row
from .figures import Picture
from .schema import Report
from .svg import INK, canvas, label, to_svg

_AXIS = (-0.3, 1.05)
_SHOW: dict[str, Callable[[float | None], str]] = {
    "share": units.percent,
    "perplexity": lambda value: units.significant(value, 4),
    "bits": units.fixed,
    "nats": units.fixed,
}


def ability_rows(report: Report) -> list[tuple[Row, str]]:
    """Dense, sparse and the relative change, and the interval of that."""
    return [(row(ability), change_interval(ability)) for ability in report.abilities]


def row(ability: Ability, *, intervals: bool = False) -> Row:
    """One ability as text; ``intervals`` adds those of the figures themselves."""
    if intervals:
        return Row(_title(ability), _interval(ability, ability.dense), _interval(ability, ability.sparse), "", "")
    show = _SHOW[ability.unit]
    judgement: Judgement = ability.judgement()  # type: ignore[assignment]
    change = units.DASH if ability.change is None else units.change(ability.change.value)
    dense = units.DASH if ability.dense is None else show(ability.dense.value)
    return Row(_title(ability), dense, show(ability.sparse.value), change, judgement)


def ability_details(report: Report) -> list[list[str]]:
    """Title, samples, chance, both figures with intervals, and the shares lost and gained."""
    return [
        [
            _title(ability),
            units.count(ability.num),
            units.percent(ability.chance) if ability.chance else units.DASH,
            _interval(ability, ability.dense),
            _interval(ability, ability.sparse),
            units.percent(ability.lost),
            units.percent(ability.gained),
        ]
        for ability in report.abilities
    ]


def ability_picture(report: Report) -> list[Picture]:
    """How much each ability lost beside perplexity; nothing without at least two changes."""
    shown = [(a, found) for a in report.abilities if (found := a.worsening()) and a.group != "control"]
    shown = [(a, found) for a, found in shown if math.isfinite(found.value)]
    if len(shown) < 2:
        return []
    with canvas(0.75 + 0.46 * len(shown)) as figure:
        axes = figure.add_subplot()
        for y, (ability, found) in enumerate(shown):
            color = INK["dense"] if ability.group == "loss" else INK["sparse"]
            value, low, high = (_clip(end) for end in (found.value, found.low, found.high))
            axes.text(0.015, y - 0.33, label(ability.title, 52), va="center")
            axes.barh(y + 0.1, value, 0.38, color=color)
            if low is not None and high is not None:
                for ink, width in ((INK["card"], 2.4), (INK["ink"], 1.0)):
                    axes.plot([low, high], [y + 0.1] * 2, color=ink, linewidth=width, solid_capstyle="butt")
            text = units.percent(found.value)
            axes.text(1.09, y + 0.1, text, va="center", ha="left", color=INK["muted"], fontsize=8.5)
        axes.axvline(0, color=INK["muted"], linewidth=0.9)
        axes.set_ylim(len(shown) - 0.5, -0.75)
        axes.set_xlim(_AXIS[0], 1.38)
        axes.set_yticks([])
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.set_xlabel("lost, relative to dense   (left is better)")
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(True, axis="x")
        said = "; ".join(f"{ability.title} {units.percent(found.value)}" for ability, found in shown)
        svg = to_svg(figure, "abilities", f"What each ability lost, relative to dense: {said}.")
    caption = (
        "How much worse each became: of perplexity and loss the rise; of accuracies the fall, as a part of what dense "
        "has above chance. Thin lines are 95 % intervals; bars end at the edge of the figure."
    )
    return [Picture("abilities", "What perplexity hides", svg, caption)]


def change_interval(ability: Ability) -> str:
    """``−47 to −18``, in per cent; empty without an interval."""
    found = ability.change
    if found is None or found.low is None or found.high is None:
        return ""
    return " to ".join(units.change(end, "", 0).strip() for end in (found.low, found.high))


def _title(ability: Ability) -> str:
    unit = {"bits": ", bits per byte", "nats": ", nats"}.get(ability.unit, "")
    return ability.title + unit


def _interval(ability: Ability, found: Figure | None) -> str:
    if found is None:
        return units.DASH
    show = _SHOW[ability.unit]
    if found.low is None or found.high is None:
        return show(found.value)
    low, high = (show(end).split(" ")[0] for end in (found.low, found.high))
    return f"{show(found.value)} ({low}{units.DASH}{high})"


def _clip(value: float | None) -> float | None:
    return None if value is None else min(max(value, _AXIS[0]), _AXIS[1])
