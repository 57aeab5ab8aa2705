"""The ``paucity`` command. Heavy imports happen inside the commands, so that it starts at once."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .checks import InputError, fail
from .cli_attention import app as attention_app
from .cli_dictionary import app as dictionary_app
from .cli_essential import essential
from .cli_evaluate import evaluate
from .cli_kinetics import kinetics, machine_table, measure
from .cli_output import Json, check_target, err, out, print_json, spinner
from .cli_packed import break_even
from .cli_study import app as study_app
from .cli_weights import prune

app = typer.Typer(
    name="paucity",
    help="Sparsity in deep learning: make a model sparse and see what it cost, in quality and in time.",
    no_args_is_help=True,
    rich_markup_mode=None,  # brackets in a help text are no markup
    add_completion=False,
    pretty_exceptions_enable=False,
)
claims_app = typer.Typer(help="Reproduce what papers claim.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(claims_app, name="claims")
app.add_typer(attention_app, name="attention")
app.command()(evaluate)
app.command()(essential)
app.command()(kinetics)
app.command()(prune)
app.command()(break_even)
app.add_typer(study_app, name="study")
app.add_typer(dictionary_app, name="dictionary")


def main() -> None:
    """Entry point: what a user did wrong is one line on stderr and exit code 2, never a traceback."""
    # The live line says what is going on; of the libraries' own lines only errors are shown.
    for name, value in (("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TORCH_CPP_LOG_LEVEL", "ERROR")):
        os.environ.setdefault(name, value)
    try:
        app()
    except (InputError, OSError) as error:
        err.print(
            f"paucity: {' '.join(str(error).split())}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)
    except KeyboardInterrupt:
        resumable = {"run", "study", "prune", "dictionary"}.intersection(sys.argv[1:2])
        goes_on = "; the same command with --resume goes on." if resumable else "."
        err.print(f"paucity: interrupted{goes_on}", style="red", markup=False)
        sys.exit(130)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    model: Annotated[
        str | None, typer.Option(help="A folder, a hub id or 'embedded', instead of the recipe's.")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder of the results [runs/RECIPE].")] = None,
    text: Annotated[str | None, typer.Option(help="A UTF-8 file to measure on, instead of the recipe's text.")] = None,
    calibration_text: Annotated[str | None, typer.Option(help="A UTF-8 file to calibrate on.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out when the run is complete.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
) -> None:
    """Make a model sparse by a recipe; write report.json, report.html and the model."""
    from .recipe import Recipe

    loaded = Recipe.load(recipe).using(model=model, text=text, calibration_text=calibration_text)
    target = out_dir or Path("runs") / recipe.stem
    from .folder import Folder
    from .pipeline import run as run_recipe
    from .report import console_table

    Folder(target, "run").check(loaded, force=force, resume=resume)
    with spinner() as progress:
        report = run_recipe(loaded, target, force=force, resume=resume, on_progress=progress)
    out.print(console_table(report))
    for sentence in report.verdict:
        out.print(f"  {sentence}", markup=False)
    steps = (f"{step.method}: {note}" for step in report.steps for note in step.notes)
    for note in [*report.model.notes, *steps]:
        out.print(f"  Note: {note}", markup=False)
    out.print(f"\nReport: {target / 'report.html'}", markup=False, soft_wrap=True)


@app.command()
def catalog(family: Annotated[str | None, typer.Option(help="One family only.")] = None, as_json: Json = False) -> None:
    """Every method: name, family, paper, title, operators, claims."""
    from .catalog import as_rows

    rows = as_rows(family)
    if as_json:
        return print_json(rows)
    table = Table("method", "family", "paper", "title", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["name"], row["family"], row["paper"], row["title"])
    out.print(table)


@app.command()
def info(
    measured: Annotated[
        bool, typer.Option("--measure", help="Also measure what this machine can do, in about ten seconds.")
    ] = False,
    target: Annotated[
        Path | None, typer.Option("--out", help="JSON file of what was measured, for `paucity kinetics --machine`.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out.")] = False,
    as_json: Json = False,
) -> None:
    """Versions, device, active kernels."""
    from .report import environment

    if target is not None and not measured:
        raise fail("info", "--out", "come with --measure", target)
    if target is not None:
        check_target("info", target, force=force)
    facts = environment().model_dump(mode="json")
    machine = None
    if measured:
        with spinner() as progress:
            machine = measure(("bfloat16", "float32"), progress)
        if target is not None:
            machine.save(target)
    if as_json:
        return print_json(facts if machine is None else facts | {"machine": machine.model_dump(mode="json")})
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        for key, text in value.items() if isinstance(value, dict) else [(None, value)]:
            table.add_row(f"{name}: {key}" if key else name, str(text))
    out.print(table)
    if machine is not None:
        out.print(machine_table(machine))
    if target is not None:
        out.print(f"\nMachine: {target}", markup=False, soft_wrap=True)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks to run [all].")] = None, as_json: Json = False
) -> None:
    """Our kernels against dense and against peers, in one run, as ratios (baseline ÷ ours: more is better)."""
    from .bench import BENCHES, run_bench

    rows = []
    for name in _chosen("bench", "name", names, BENCHES):
        with spinner() as progress:
            progress(f"bench {name}")
            rows += [row.to_json() for row in run_bench(name)]
    if as_json:
        return print_json(rows)
    table = Table("bench", "size", "baseline", "ours ms", "baseline ms", "ratio", "limit", box=None, pad_edge=False)
    for row in rows:
        times = (f"{1e3 * row['seconds']:.1f}", f"{1e3 * row['baseline_seconds']:.1f}")
        table.add_row(
            row["bench"], row["size"], row["baseline"], *times, f"{row['ratio']:.2f}", f"{row['limit_ratio']:.1f}"
        )
    out.print(table)


@claims_app.command("list")
def claims_list(as_json: Json = False) -> None:
    """Every claim, with what its paper states."""
    from .claims import CLAIMS

    if as_json:
        return print_json([{"claim": name, "paper": c.paper, "statement": c.statement} for name, c in CLAIMS.items()])
    table = Table("claim", "paper", "statement", box=None, pad_edge=False)
    for name, claim in CLAIMS.items():
        table.add_row(name, claim.paper, claim.statement)
    out.print(table)


@claims_app.command("run")
def claims_run(
    names: Annotated[list[str] | None, typer.Argument(help="Claims to run [all].")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="At most 30 seconds each.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    as_json: Json = False,
) -> None:
    """Reproduce claims: the paper's figure, ours, whether it holds. Exit code 1 where one does not."""
    from dataclasses import asdict

    from .claims import CLAIMS, run_claim

    results = []
    for name in _chosen("claims", "name", names, CLAIMS):
        with spinner() as progress:
            progress(name)
            result = run_claim(name, quick=quick, seed=seed)
        results.append(result)
        if not as_json:
            out.print(f"[bold]{name}[/] ({result.paper}): {result.statement}", highlight=False)
            out.print(f"  paper: {result.paper_figure}\n  ours:  {result.measured}", markup=False)
            out.print(f"  {'holds' if result.holds else 'does not hold'} ({result.seconds:.0f} s)", markup=False)
    if as_json:
        print_json([asdict(result) for result in results])
    if not all(result.holds for result in results):
        raise typer.Exit(1)


def _chosen(function: str, argument: str, names: list[str] | None, table: dict[str, Any]) -> list[str]:
    from .checks import check_choice

    for name in names or []:
        check_choice(function, argument, name, table)
    return names or sorted(table)


if __name__ == "__main__":
    main()
