"""``paucity kinetics``: where the time of a generation goes on this machine, and which attention and model to take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .cli_output import Json, err, out, print_json, spinner

if TYPE_CHECKING:
    from .kinetics import Plan
    from .measure.machine import Machine


def kinetics(
    model: Annotated[list[str], typer.Option(help="A folder, a hub id or 'embedded'; several are compared.")],
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 4096,
    generate: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    trials: Annotated[int, typer.Option(min=1, help="Answers to each prompt (best of N).")] = 1,
    shared_prompt: Annotated[
        bool,
        typer.Option("--shared-prompt/--copied-prompt", help="Trials read the keys of their prompt once for all."),
    ] = True,
    budget: Annotated[list[int] | None, typer.Option(min=1, help="Keys that a step reads; several are tried.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Sparse attention [block_topk]; several are tried.")] = None,
    machine: Annotated[Path | None, typer.Option(help="From `paucity info --measure --out` [measured now].")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of weights and cache [the model's].")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="The generation may take.")] = None,
    as_json: Json = False,
) -> None:
    """Where the time of a generation goes, dense and with fewer keys, and what to take: Kinetics' cost model."""
    from .checks import check_choice, check_range
    from .kinetics import BUDGETS, METHODS, Workload, crossover, plans, recommend, shape_of

    if max_seconds is not None:
        check_range("kinetics", "--max-seconds", max_seconds, 0, open_low=True)
    for name in method or []:
        check_choice("kinetics", "--method", name, METHODS)
    with spinner() as progress:
        shapes = []
        for name in dict.fromkeys(model):
            progress(f"reading {name}")
            shapes.append(shape_of(name, dtype=dtype))
        work = Workload(prompt, generate, batch=batch, trials=trials, shared_prompt=shared_prompt)
        measured = _machine(machine, tuple(dict.fromkeys(shape.dtype for shape in shapes)), progress)
    options = plans(shapes, work, measured, methods=method or ["block_topk"], budgets=budget or BUDGETS)
    for keys in sorted({keys for keys in budget or () if keys >= prompt + generate}):
        note = f"A budget of {keys:,} keys leaves none of the {prompt + generate:,} tokens out: it is dense attention."
        err.print(note, markup=False, highlight=False, soft_wrap=True)
    advice = recommend(options, max_seconds=max_seconds)
    crossings = {shape.name: crossover(shape, measured, batch=batch * trials) for shape in shapes}
    if as_json:
        return print_json(
            {
                "machine": measured.model_dump(mode="json"),
                "plans": [_row(plan) for plan in options],
                "crossover": crossings,
                "recommended": _row(advice.plan),
                "reasons": list(advice.reasons),
            }
        )
    out.print(_table(options, advice.plan))
    for plan in options:
        if plan.reading is None:
            tokens = crossings[plan.shape.name]
            where = "never takes most of a step" if tokens is None else f"takes most of a step from {tokens} tokens on"
            out.print(
                f"{plan.shape.name}: prefill takes {_short(plan.prefill.total)} s, "
                f"keys and values {_short(plan.cache_bytes / 1e6)} MB; dense attention {where}.",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
    out.print(f"\nTake {advice.plan.label}.", markup=False, highlight=False, soft_wrap=True)
    for reason in advice.reasons:
        out.print(f"  {reason}", markup=False, highlight=False, soft_wrap=True)


def measure(dtypes: tuple[str, ...], progress: Any) -> "Machine":
    """Measure this machine in ``dtypes``, on the GPU if there is one."""
    import torch

    from .measure.probes import measure_machine

    progress("measuring this machine")
    return measure_machine(
        dtypes,
        device="cuda" if torch.cuda.is_available() else "cpu",
        on_progress=lambda done, total: progress(f"measuring this machine: round {done} of {total}"),
    )


def machine_table(machine: "Machine") -> Table:
    """The rates of a machine for reading."""
    table = Table("rate", *machine.rates, box=None, pad_edge=False)

    def row(name: str, values: list[float], unit: float, digits: int = 1) -> None:
        table.add_row(name, *(f"{value / unit:.{digits}f}" for value in values))

    rates = list(machine.rates.values())
    row("memory, GB/s read", [machine.bandwidth] * len(rates), 1e9)
    row("products, GFLOP/s at most", [rate.arithmetic for rate in rates], 1e9)
    for rows in rates[0].products:
        row(f"products of {rows} rows, GFLOP/s", [rate.products[rows] for rate in rates], 1e9)
    for length in rates[0].prefill_attention:
        row(f"causal attention of {length} tokens, GFLOP/s", [rate.prefill_attention[length] for rate in rates], 1e9)
    row("decoding reads listed pages, GB/s", [rate.listed_bytes for rate in rates], 1e9)
    for group in rates[0].decode_bytes:
        row(
            f"decoding reads its cache, {group} heads to a key, GB/s", [rate.decode_bytes[group] for rate in rates], 1e9
        )
    row("norms and activations, GB/s", [rate.moved_bytes for rate in rates], 1e9)
    row("a layer besides its products, microseconds", [rate.layer_seconds for rate in rates], 1e-6)
    row("a model besides its layers, microseconds", [rate.forward_seconds for rate in rates], 1e-6)
    row("FLOP a byte", [machine.intensity(dtype) for dtype in machine.rates], 1)
    return table


def _machine(path: Path | None, dtypes: tuple[str, ...], progress: Any) -> "Machine":
    from .checks import check_choice
    from .measure.machine import Machine
    from .measure.probes import DTYPES

    for dtype in dtypes:
        check_choice("kinetics", "--dtype", dtype, DTYPES)
    return measure(dtypes, progress) if path is None else Machine.load(path)


def _short(value: float) -> str:
    """Three digits, and no powers of ten for what is large."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _row(plan: "Plan") -> dict[str, Any]:
    decode = plan.decode
    return {
        "model": plan.shape.name,
        "method": plan.method,
        "num_keys": plan.num_keys,
        "seconds": plan.seconds,
        "prefill_seconds": plan.prefill.total,
        "decode_seconds": decode.total,
        "linear_seconds": decode.linear,
        "attention_seconds": decode.attention,
        "search_seconds": decode.search,
        "moved_seconds": decode.moved,
        "call_seconds": decode.calls,
        "attention_share": decode.attention_share,
        "eflops": plan.eflops,
        "cache_bytes": plan.cache_bytes,
    }


def _table(options: "tuple[Plan, ...]", best: "Plan") -> Table:
    names = ("decode s", "weights", "keys", "search", "other", "Tera-eFLOP")
    table = Table("model", "attention", "read", *names, box=None, pad_edge=False)
    for plan in options:
        decode = plan.decode
        parts = (decode.linear, decode.attention, decode.search, decode.moved + decode.calls)
        table.add_row(
            plan.shape.name,
            plan.method,
            "all" if plan.num_keys is None else str(plan.num_keys),
            *(_short(part) for part in (decode.total, *parts, plan.eflops / 1e12)),
            style="bold" if plan is best else None,
        )
    return table
