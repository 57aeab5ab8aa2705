"""``paucity study attention``: methods × tasks × budgets × phases × lengths, with a page of the frontiers."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_output import Json, bar, out, print_json

app = typer.Typer(help="Compare many methods on many tasks.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def study() -> None:
    """Compare many methods on many tasks."""


@app.command()
def attention(
    plan: Annotated[Path | None, typer.Argument(help="A study in YAML; options given here go before it.")] = None,
    model: Annotated[str | None, typer.Option(help="A folder, a hub id or 'embedded'.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few methods, tasks and prompts: minutes on two cores.")
    ] = False,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder of the results [runs/study].")] = None,
    methods: Annotated[str | None, typer.Option(help="Names in the catalogue, separated by commas.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks, separated by commas; perplexity is one.")] = None,
    budgets: Annotated[str | None, typer.Option(help="Shares that may be read, as 0.05,0.1.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths of the prompts in tokens, as 2048,4096.")] = None,
    phases: Annotated[str | None, typer.Option(help="prefill, decode, or both separated by a comma.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Sets of prompts.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Prompts of a task with one seed.")] = None,
    text: Annotated[str | None, typer.Option(help="A UTF-8 file as haystack, instead of the built-in text.")] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of lm-eval or YAML files of such, separated by commas.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each lm-eval task.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, with --ray.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Measure in processes of Ray.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace --out when the study is complete.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted study.")] = False,
    as_json: Json = False,
) -> None:
    """Sparse attention methods against each other and dense: quality against what is read, and against cost."""
    from .checks import fail
    from .study import Study, default_study
    from .study.run import run

    if quick and plan is not None:
        raise fail("study", "--quick", "be left out with a plan, which says itself what is measured", plan)
    fields: dict[str, Any] = {
        "model": model,
        "methods": _words(methods),
        "tasks": _words(tasks),
        "budgets": _numbers("budgets", budgets, float),
        "lengths": _numbers("lengths", lengths, int),
        "phases": _words(phases),
        "seeds": seeds,
        "num_prompts": prompts,
        "text": text,
        "lm_eval": _words(lm_eval),
        "limit": limit,
    }
    chosen = Study.load(plan).changed(**fields) if plan else default_study(quick=quick, **fields)
    target = out_dir or Path("runs") / (plan.stem if plan else "study")
    with bar() as tell:
        result = run(chosen, target, force=force, resume=resume, workers=workers, ray=ray, on_progress=tell)
    if as_json:
        return print_json(result.model_dump(mode="json"))
    for phase in chosen.phases:
        out.print(_table(result, phase))
    for sentence in result.verdict:
        out.print(f"  {sentence}", markup=False, highlight=False)
    out.print(f"\nPage: {target / 'study.html'}", markup=False, soft_wrap=True)


def _table(result: Any, phase: Any) -> Table:
    """Accuracy and density of each method and budget of a phase, at the longest prompts."""
    from .study.results import ALL_TASKS
    from .study.verdict import NAMES

    longest = max(row.length for row in result.rows)
    tasks = [task for task, length in result.tasks(phase) if length == longest]
    title = f"{NAMES[phase]}, {longest:,} tokens"
    table = Table("method", "read", *tasks, box=None, pad_edge=False, title=title, title_justify="left")
    settings: dict[tuple[str, float], dict[str, Any]] = {}
    for row in result.rows:
        if (row.phase, row.length) == (phase, longest):
            settings.setdefault((row.method, row.budget), {})[row.task] = row
    for (method, _), rows in settings.items():
        shown = rows.get(ALL_TASKS) or next(iter(rows.values()))
        figures = (rows.get(task) for task in tasks)
        cells = ("–" if r is None else f"{100 * r.value:.0f} %" if r.is_accuracy else f"{r.value:.3f}" for r in figures)
        table.add_row(method, f"{100 * shown.density:.1f} %", *cells)
    return table


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _numbers(name: str, text: str | None, kind: type[int] | type[float]) -> list[int] | list[float] | None:
    from .checks import fail

    try:
        return None if text is None else [kind(word) for word in _words(text) or ()]  # type: ignore[return-value]
    except ValueError:
        raise fail("study", f"--{name}", "be numbers separated by commas", text) from None
