"""``paucity essential``: how much of a model can go in one shot, and where it breaks."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .cli_output import Json, check_target, out, print_json, spinner

if TYPE_CHECKING:
    from .weights.essential import Curve


def essential(
    model: Annotated[str, typer.Argument(help="A folder, a hub id or 'embedded'.")],
    pattern: Annotated[list[str] | None, typer.Option(help="unstructured or nm; both by repeating [both].")] = None,
    m: Annotated[int, typer.Option(min=2, help="Of the N:M patterns: n of every m inputs stay.")] = 8,
    text: Annotated[list[str] | None, typer.Option(help="python, held_out_python or a UTF-8 file; several.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each text.")] = 4096,
    drop: Annotated[float, typer.Option(help="Share of quality that is tolerated.")] = 0.01,
    control: Annotated[bool, typer.Option("--control/--no-control", help="Also remove weights at random.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the random order.")] = 0,
    target: Annotated[Path | None, typer.Option("--out", help="JSON file of all points.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out.")] = False,
    as_json: Json = False,
) -> None:
    """Remove the smallest weights at once, more and more: the knee of quality, and the sparsity that costs nothing."""
    from .checks import check_choice, check_range

    patterns = list(dict.fromkeys(pattern or ["unstructured", "nm"]))
    for name in patterns:
        check_choice("essential", "--pattern", name, ("unstructured", "nm"))
    check_range("essential", "--drop", drop, 0, 1, open_low=True, open_high=True)
    if target is not None:
        check_target("essential", target, force=force)
    from .folder import write_whole
    from .measure.data import read_text
    from .measure.tokens import context_length
    from .models.load import load
    from .weights.essential import Order, essential_sparsity, text_measure

    names = list(dict.fromkeys(text or ["held_out_python"]))
    texts = {name: read_text(name, role="measured") for name in names}
    orders: tuple[Order, ...] = ("magnitude", "random") if control else ("magnitude",)
    curves: dict[str, list[Curve]] = {}
    with spinner() as progress:
        progress(f"loading {model}")
        loaded = load(model)
        length = min(512, context_length(loaded.model) or 512)
        for name, content in texts.items():
            measure, chance = text_measure(loaded, content, max_tokens=max_tokens, length=length)
            curves[name] = [
                essential_sparsity(
                    loaded.model, measure, chance=chance, m=m if kind == "nm" else None, order=order, drop=drop,
                    seed=seed,
                    on_progress=lambda done, total, kind=kind, order=order, name=name: progress(  # type: ignore[misc]
                        f"{name}, {kind}, {order}: {done} of {total}"
                    ),
                )
                for kind in patterns
                for order in orders
            ]  # fmt: skip
    result = {
        "model": loaded.source,
        "max_tokens": max_tokens,
        "curves": [{"text": name} | curve.to_json() for name, found in curves.items() for curve in found],
    }
    if target is not None:
        write_whole(target, json.dumps(result, indent=2))
    if as_json:
        return print_json(result)
    for name, found in curves.items():
        out.print(f"{loaded.source} on {name}", markup=False, highlight=False, soft_wrap=True)
        out.print(_table(found, drop))
    for note in dict.fromkeys(note for found in curves.values() for curve in found for note in curve.notes):
        out.print(f"  Note: {note}", markup=False, highlight=False, soft_wrap=True)
    if target is not None:
        out.print(f"\nCurves: {target}", markup=False, soft_wrap=True)


def _table(curves: "list[Curve]", drop: float) -> Table:
    names = ("first go", "pattern", "dense", f"-{drop:.0%} at", "knee at", "keeps", "slopes")
    table = Table(*names, box=None, pad_edge=False)
    for curve in curves:
        row = ["smallest" if curve.order == "magnitude" else "random", curve.pattern]
        row += [f"{curve.points[0].quality:.3f}", f"{curve.tolerated:.0%}"]
        if curve.knee is None:
            row += ["none", "", ""]
        else:
            slopes = f"{curve.knee.slope_before:.2f}, {curve.knee.slope_after:.2f}"
            row += [f"{curve.knee.x:.0%}", f"{curve.knee.y:.0%}", slopes]
        table.add_row(*row)
    return table
