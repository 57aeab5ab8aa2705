"""What every command prints with."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .checks import fail

out = Console()
err = Console(stderr=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def check_target(function: str, target: Path, *, force: bool) -> None:
    """Refuse a file that could not be written, or should not be, before the work that it is to hold."""
    if target.is_dir():
        raise fail(function, "--out", "be a file", f"{target}, a folder")
    if target.exists() and not force:
        raise fail(function, "--out", "not exist (--force replaces it)", target)
    if not target.parent.is_dir():
        raise fail(function, "--out", "be in a folder that exists", target)


def print_json(value: object) -> None:
    """To stdout, indented."""
    print(json.dumps(value, indent=2))


@contextmanager
def spinner() -> Iterator[Any]:
    """A live line on stderr with what is being done, and for how long."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("starting")

        def update(description: str) -> None:
            progress.update(task, description=description)

        yield update


@contextmanager
def bar() -> Iterator[Any]:
    """A progress bar on stderr: what is done, the time that is left, and what is being done."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("loading the model", total=None)

        def tell(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        yield tell
