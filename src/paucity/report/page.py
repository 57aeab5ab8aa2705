"""report.html: one self-contained file, no script and nothing loaded from elsewhere."""

import re

import yaml
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from . import units
from .abilities import ability_details, ability_picture, ability_rows
from .compare import MARKS, rows
from .figures import pictures
from .patterns import head_pictures
from .schema import AttentionLayer, Report


def render(report: Report) -> str:
    """The page as HTML; every string of the report is escaped, and a section without data is left out."""
    plain = report.model_dump(mode="json")
    return (
        templates("paucity.report")
        .get_template("page.html.j2")
        .render(
            report=report,
            options=[step["options"] for step in plain["steps"]],
            recipe=plain["recipe"],
            rows=rows(report),
            marks=MARKS,
            pictures=[*pictures(report)[:1], *ability_picture(report), *pictures(report)[1:]],
            abilities=ability_rows(report),
            ability_details=ability_details(report),
            heads=head_pictures(report),
            attention=[_layer(entry) for entry in report.attention],
            retrieval=_retrieval(report),
            sites=[(name, report.dense.density.get(name), value) for name, value in report.sparse.density.items()],
        )
    )


def templates(*packages: str) -> Environment:
    """The pages of these packages; the first that has a template of a name gives it. ``base.html.j2`` is here."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ".") for package in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": units.count,
        "duration": lambda value: _unbroken(units.duration(value)),
        "percent": lambda value: _unbroken(units.percent(value)),
        "unbroken": _unbroken,
        "listed": units.listed,
        "si": lambda value: _unbroken(units.scaled(value, "")),
        "yaml": _yaml,
    }
    return environment


def _layer(entry: AttentionLayer) -> list[str]:
    """Layer, tokens, density, recall and error as means over heads, and the times."""
    means = [None if x is None else sum(x) / len(x) for x in (entry.density, entry.recall, entry.output_error)]
    times = (entry.dense_ms, entry.sparse_ms, entry.select_ms)
    return [str(entry.layer), units.count(entry.tokens), *map(units.percent, means), *map(units.ms, times)]


def _unbroken(text: str) -> str:
    """No line break between a number and its unit."""
    return re.sub(r"(?<=\d) (?=(?:%|ms|s|min|h|[kMGTPE])(?:\W|$))", "\N{NO-BREAK SPACE}", text)


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def _retrieval(report: Report) -> list[tuple[str, int, str, str]]:
    """Task, length and both accuracies with their intervals, by task and length."""
    sides: list[dict[tuple[str, int], str]] = []
    for model in (report.dense, report.sparse):
        sides.append(
            {
                (entry.task, entry.length): f"{units.percent(entry.accuracy)} "
                f"({units.percent(entry.low, 0)[:-2]}{units.DASH}{units.percent(entry.high, 0)[:-2]})"
                for entry in model.retrieval
            }
        )
    tasks = list(dict.fromkeys(task for side in sides for task, _ in side))
    keys = sorted({*sides[0], *sides[1]}, key=lambda key: (tasks.index(key[0]), key[1]))
    dense, sparse = sides
    return [(*key, dense.get(key, units.DASH), sparse.get(key, units.DASH)) for key in keys]
