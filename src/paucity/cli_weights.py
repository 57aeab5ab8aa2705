"""``paucity prune``: a pruned model from a model, block by block."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from .cli_output import Json, bar, out, print_json

if TYPE_CHECKING:
    from .weights.pruner import Pruner


def prune(
    model: Annotated[str, typer.Argument(help="A folder, a hub id or 'embedded'.")],
    target: Annotated[Path, typer.Option("--out", help="Folder of the pruned model, an ordinary Hugging Face one.")],
    method: Annotated[
        Literal["dsnot", "magnitude", "random", "sparsegpt", "taylor", "wanda"], typer.Option(help="How to prune.")
    ] = "wanda",
    sparsity: Annotated[float | None, typer.Option(help="Fraction removed [0.5; of N:M it follows].")] = None,
    n: Annotated[int | None, typer.Option(help="Keep n of every m consecutive inputs.")] = None,
    m: Annotated[int | None, typer.Option(help="See --n.")] = None,
    block: Annotated[
        tuple[int, int] | None, typer.Option(help="Rows and columns of the blocks that stay or go as one.")
    ] = None,
    scope: Annotated[
        Literal["row", "layer", "global"] | None, typer.Option(help="What competes [of the method].")
    ] = None,
    allocation: Annotated[
        Literal["uniform", "erk", "owl", "cfsp", "greedy"], typer.Option(help="How layers share the sparsity.")
    ] = "uniform",
    order: Annotated[
        Literal["dense", "block"],
        typer.Option(help="Calibrate a block in the dense model, or behind pruned blocks as the papers' code."),
    ] = "dense",
    sites: Annotated[
        list[str] | None, typer.Option(help="Kinds or groups of weights [linear]; may be repeated.")
    ] = None,
    calibration_text: Annotated[str, typer.Option(help="A UTF-8 file, or 'python'.")] = "python",
    num_samples: Annotated[int, typer.Option(min=1, help="Windows of the calibration text.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the windows, and of random masks.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace --out when the model is complete.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the same job was killed.")] = False,
    as_json: Json = False,
) -> None:
    """Prune a causal language model to a folder that any tool loads, one block in memory at a time where it can be."""
    from .weights.pruning import PRUNERS, is_calibrated
    from .weights.to_folder import prune_folder

    given: dict[str, Any] = {"sparsity": sparsity, "n": n, "m": m, "block": block, "scope": scope}
    options = {name: value for name, value in given.items() if value is not None} | {
        "allocation": allocation,
        "order": order,
    }
    if sites:
        options["sites"] = tuple(sites)
    if method == "random":
        options["seed"] = seed
    pruner = _pruner(PRUNERS[method], options)
    calibration = _calibration(model, calibration_text, num_samples, length, seed) if is_calibrated(pruner) else []
    about = {"text": calibration_text, "num_samples": num_samples, "length": length, "seed": seed}
    with bar() as tell:
        record = prune_folder(
            model, target, pruner, calibration=calibration, about=about, force=force, resume=resume, on_progress=tell
        )
    if as_json:
        return print_json(record)
    table = Table(show_header=False, box=None, pad_edge=False)
    layers = record["layers"].values()
    table.add_row("method", method)
    table.add_row("sparsity", f"{record['sparsity']:.2%} of {len(record['layers'])} layers ({_range(layers)})")
    table.add_row("calibration", f"{record['calibration_tokens']:,} tokens" if calibration else "none")
    table.add_row("seconds", f"{record['seconds']:.1f}")
    out.print(table)
    for note in record["notes"]:
        out.print(f"  Note: {note}", markup=False)
    out.print(f"\nModel: {target}", markup=False, soft_wrap=True)


def _pruner(kind: "type[Pruner]", options: dict[str, Any]) -> "Pruner":
    from pydantic import ValidationError

    from .recipe import one_line

    try:
        return kind(**options)
    except ValidationError as error:
        raise one_line(error, "prune", list(kind.model_fields)) from None


def _calibration(model: str, text: str, num_samples: int, length: int, seed: int) -> list[Any]:
    from .measure.data import read_text
    from .models.calibration import calibration_batches
    from .models.streamed import load_tokenizer, model_folder

    words = read_text(text, role="calibration")
    tokenizer = load_tokenizer(model_folder(model))
    return list(calibration_batches(tokenizer, words, num_samples=num_samples, length=length, seed=seed))


def _range(layers: Any) -> str:
    return f"{min(layers):.1%} to {max(layers):.1%}"
