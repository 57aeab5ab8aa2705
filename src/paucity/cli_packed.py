"""``paucity break-even``: at which density packed weights become faster than dense ones on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .checks import check_choice, check_range, fail
from .cli_output import Json, check_target, out, print_json, spinner

if TYPE_CHECKING:
    from .weights.break_even_report import BreakEven

_SHAPES = [(768, 768), (3072, 768), (768, 3072), (4096, 4096)]


def break_even(
    model: Annotated[
        str | None, typer.Option(help="Measure its layers, and decode with it: a folder, a hub id or 'embedded'.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Outputs of the one layer to measure.")] = None,
    cols: Annotated[int | None, typer.Option(min=1, help="Inputs of the same.")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Shares of nonzeros; several.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Tokens at a time; several [1, 4, 16].")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Of weights [bfloat16, or the model's]; several.")] = None,
    format: Annotated[list[str] | None, typer.Option(help="bitmask, blocks, nm [all]; several.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer densities and rounds, in under a minute.")] = False,
    target: Annotated[Path | None, typer.Option("--out", help="JSON file of what was measured.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out.")] = False,
    as_json: Json = False,
) -> None:
    """On this machine, at which density and batch packed weights are faster than dense ones."""
    name = "break-even"
    if (rows is None) != (cols is None) or (rows is not None and model is not None):
        raise fail(name, "--rows and --cols", "be given together, and without --model", f"rows {rows}, cols {cols}")
    for value in density or []:
        check_range(name, "--density", value, 0, 1, open_low=True, open_high=True)
    if target is not None:
        check_target(name, target, force=force)
    from .folder import write_whole
    from .models.load import load
    from .weights.break_even import COLD_BYTES, DENSITIES, FORMATS, measure_break_even

    for kind in format or []:
        check_choice(name, "--format", kind, FORMATS)
    with spinner() as progress:
        progress(f"loading {model}" if model else "making weights")
        shapes = _SHAPES[:3] if quick else _SHAPES
        found = measure_break_even(
            load(model) if model else [(rows, cols)] if rows and cols else shapes,
            densities=density or ((0.25, 0.5, 0.75) if quick else DENSITIES),
            batches=batch or ((1, 16) if quick else (1, 4, 16)),
            dtypes=dtype,
            formats=[kind for kind in FORMATS if format is None or kind in format],
            repeats=3 if quick else 7,
            cold_bytes=COLD_BYTES // 3 if quick else COLD_BYTES,
            on_progress=progress,
        )
    if target is not None:
        write_whole(target, found.model_dump_json(indent=2) + "\n")
    if as_json:
        return print_json(found.model_dump(mode="json"))
    _show(found)
    if target is not None:
        out.print(f"\nMeasured: {target}", markup=False, soft_wrap=True)


def _show(found: "BreakEven") -> None:
    """Tables for reading: a row for each layer and format, a column for each density."""
    densities = sorted({row.density for row in found.rows})
    table = Table(
        "layer", "dtype", "tokens", "format", *(f"{value:.0%}" for value in densities), "even at", "bytes at least",
        box=None, pad_edge=False,
    )  # fmt: skip
    for entry in found.crossovers:
        key = (entry.rows, entry.cols, entry.dtype, entry.batch, entry.format)
        mine = {r.density: r for r in found.rows if (r.rows, r.cols, r.dtype, r.batch, r.format) == key}
        cells = (f"{mine[value].speedup:.2f}x" if value in mine else "" for value in densities)
        even = "never" if entry.density is None else "beyond" if entry.density == 1 else f"{entry.density:.0%}"
        least = min(row.num_bytes / row.dense_bytes for row in mine.values())
        size = f"{entry.rows}x{entry.cols}"
        table.add_row(size, entry.dtype, str(entry.batch), entry.format, *cells, even, f"{least:.0%}")
    out.print(f"Dense over packed time by density, {found.machine}, {found.threads} threads:\n", markup=False)
    out.print(table)
    if found.decoding:
        decoding = Table("decoding", "density", "ms a token", "dense", "faster", box=None, pad_edge=False)
        for step in found.decoding:
            times = (f"{step.ms:.2f}", f"{step.dense_ms:.2f}", f"{step.dense_ms / step.ms:.2f}x")
            decoding.add_row(step.format, f"{step.density:.0%}", *times)
        out.print()
        out.print(decoding)
    out.print()
    for sentence in found.advice:
        out.print(sentence, markup=False, highlight=False, soft_wrap=True)
