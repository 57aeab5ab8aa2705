"""``paucity evaluate``: what a model knows, reads, sums up and chooses, alone or beside the dense one."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from .checks import check_choice, fail
from .cli_output import Json, out, print_json, spinner


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder, a hub id or 'embedded'.")],
    against: Annotated[str | None, typer.Option(help="The dense model to compare with, asked the same.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Tasks, one an option [all].")] = None,
    questions: Annotated[str, typer.Option(help="'python' or a JSON Lines file of closed-book questions.")] = "python",
    choices: Annotated[list[str] | None, typer.Option(help="'next_lines' or JSON Lines files of choices.")] = None,
    summaries: Annotated[str, typer.Option(help="'outlines', 'docstrings' or a JSON Lines file.")] = "outlines",
    lm_eval: Annotated[list[str] | None, typer.Option(help="Tasks of lm-eval, or YAML files of such.")] = None,
    text: Annotated[str, typer.Option(help="A UTF-8 file for perplexity and the haystacks.")] = "held_out_python",
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of everything.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    as_json: Json = False,
) -> None:
    """Ask a model what perplexity does not show; figures come with 95 % intervals."""
    from .measure.data import read_text
    from .measure.kick import abilities_of, compare_abilities
    from .measure.kick_jobs import prepare
    from .measure.kick_options import ALL, Kick
    from .models.load import load
    from .recipe import built

    for task in tasks or ():
        check_choice("evaluate", "task", task, ALL)
    given: dict[str, Any] = {"questions": questions, "summaries": summaries}
    given |= {name: value for name, value in (("tasks", tasks), ("choices", choices), ("lm_eval", lm_eval)) if value}
    options = built(Kick, given, "evaluate")
    options = options.quick() if quick else options
    read = read_text(text, role="measure")
    with spinner() as progress:
        progress(f"loading {model}")
        sparse = load(model)
        dense = None if against is None else load(against)
        tokenizer = sparse.need_tokenizer("evaluate")
        if dense is not None and dense.need_tokenizer("evaluate").get_vocab() != tokenizer.get_vocab():
            raise fail("evaluate", "--against", f"have the tokenizer of {model}", against)
        jobs = prepare(options, sparse.model, tokenizer, read, seed)
        if dense is None:
            found = abilities_of(options, jobs, sparse.model, tokenizer, read, seed=seed, tell=progress)
        else:
            models = {"dense": dense.model, "sparse": sparse.model}
            found = compare_abilities(options, jobs, models, tokenizer, read, seed=seed, tell=progress)
    if as_json:
        return print_json({"model": model, "against": against, "abilities": [_plain(asdict(a)) for a in found]})
    from .report.abilities import change_interval, row
    from .report.ability import Ability

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    columns = (model,) if dense is None else ("dense", "sparse", "change")
    for name in columns:
        table.add_column(name, justify="right")
    if dense is not None:
        table.add_column("", no_wrap=True)
    for ability in found:
        told = Ability(**asdict(ability))
        shown = row(told, intervals=dense is None)
        change = " ".join(filter(None, (shown.change, (inside := change_interval(told)) and f"({inside})")))
        cells = (shown.sparse,) if dense is None else (shown.dense, shown.sparse, change, shown.judgement)
        table.add_row(shown.label, *cells)
    out.print(table)
    if dense is not None:
        out.print("  Change: relative to dense, with its 95 % interval; of accuracies, of what dense has above chance.")


def _plain(value: Any) -> Any:
    """Values that JSON has: infinite figures become text."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return str(value) if isinstance(value, float) and value - value != 0 else value
