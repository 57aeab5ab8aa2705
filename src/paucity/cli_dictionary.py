"""``paucity dictionary``: sparse features of a model's activations, trained, measured and looked at."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .checks import check_choice
from .cli_output import Json, bar, out, print_json

app = typer.Typer(
    help="Sparse features of a model's activations: train, eval, info.", no_args_is_help=True, rich_markup_mode=None
)
Model = Annotated[str, typer.Option(help="A folder, a hub id or 'embedded'.")]
EvalText = Annotated[str, typer.Option(help="A UTF-8 file to measure on, or 'held_out_python'.")]


@app.command()
def train(
    model: Model = "embedded",
    hook: Annotated[
        list[str] | None,
        typer.Option(
            help="Where: residual.L, mlp.L, attention.L, heads.L, heads.L.H, or a module, PATH or PATH.input; several "
            "are read in one forward [the residual stream of the middle block]."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="A learned dictionary of `paucity catalog`.")] = "topk_sae",
    dict_size: Annotated[list[int] | None, typer.Option(min=1, help="Atoms; several are a sweep [8 x width].")] = None,
    k: Annotated[list[int] | None, typer.Option(min=1, help="Entries of a code; several are a sweep.")] = None,
    l1: Annotated[list[float] | None, typer.Option(min=0, help="Weight of a penalty; several are a sweep.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Several are a sweep [0].")] = None,
    num_tokens: Annotated[int | None, typer.Option(min=1, help="Activations that a training sees [1,000,000].")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Activations of a step.")] = 1024,
    learning_rate: Annotated[float, typer.Option(help="The highest of the schedule.")] = 1e-3,
    text: Annotated[str, typer.Option(help="A UTF-8 file to train on, or 'python'.")] = "python",
    text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of the text; fewer are passed over again [num_tokens].")
    ] = None,
    eval_text: EvalText = "held_out_python",
    eval_tokens: Annotated[int, typer.Option(min=2, help="Tokens of it.")] = 16_384,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    live: Annotated[bool, typer.Option("--live", help="Run the model while training; keep no activations.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A first look, in minutes: fewer tokens.")] = False,
    target: Annotated[Path, typer.Option("--out", help="Folder of the dictionaries.")] = Path("runs/dictionary"),
    force: Annotated[bool, typer.Option("--force", help="Replace --out when the training is complete.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the same job was killed.")] = False,
    as_json: Json = False,
) -> None:
    """Train dictionaries on a model's activations, several places and a sweep at once, and measure them."""
    from .dictionary.build import learned
    from .dictionary.job import Options
    from .recipe import built

    check_choice("dictionary", "--method", method, learned())
    tokens = num_tokens or (300_000 if quick else 1_000_000)
    options = built(
        Options,
        {
            "hooks": hook or (),
            "dict_size": dict_size or (),
            "k": k or (),
            "l1": l1 or (),
            "seeds": seed or (0,),
            "num_tokens": tokens,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "live": live,
        },
        "dictionary",
    )
    texts = {"text": text, "text_tokens": text_tokens or (min(tokens, 65_536) if quick else tokens), "length": length}
    texts |= {"eval_text": eval_text, "eval_tokens": min(eval_tokens, 8192) if quick else eval_tokens}
    from .dictionary.to_folder import train_folder

    with bar() as tell:
        record = train_folder(model, target, method, options, texts, force=force, resume=resume, on_progress=tell)
    if as_json:
        return print_json(record)
    _show(record)
    out.print(f"\nDictionaries: {target}", markup=False, soft_wrap=True)


@app.command("eval")
def evaluate(
    source: Annotated[
        str, typer.Argument(help="A folder that `paucity dictionary train` wrote, or a dictionary of another tool.")
    ],
    model: Annotated[str | None, typer.Option(help="Instead of the model that it was trained on.")] = None,
    hook: Annotated[str | None, typer.Option(help="Instead of the place that it was trained at.")] = None,
    text: EvalText = "held_out_python",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of it.")] = 16_384,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    truth: Annotated[
        str | None, typer.Option(help="A safetensors file of the true atoms [n, width]: mean correlation coefficient.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="A folder of other trainings: stability. May be given again.")
    ] = None,
    by_letters: Annotated[
        bool, typer.Option("--letters", help="First letters of words: sparse probing and absorption.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of intervals and of the words' order.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure trained dictionaries on another text or model: error, L0, dead share, loss, and what is asked for."""
    from .dictionary.to_folder import Asked, eval_folder

    texts = {"eval_text": text, "eval_tokens": tokens, "length": length}
    asked = Asked(truth=truth, against=tuple(against or ()), letters=by_letters, seed=seed)
    with bar() as tell:
        record = eval_folder(source, model=model, hook=hook, texts=texts, asked=asked, on_progress=tell)
    if as_json:
        return print_json(record)
    _show(record)
    _show_asked(record)


@app.command()
def info(
    source: Annotated[str, typer.Argument(help="A folder of dictionaries, or of cached activations.")],
    as_json: Json = False,
) -> None:
    """What a folder holds: dictionaries with their sizes and metrics, or cached activations."""
    from .dictionary.cache import FILE, read_facts
    from .dictionary.to_folder import read_records

    if not (Path(source) / FILE).is_file():
        record = {"dictionaries": [described for _, described in read_records(source)]}
        return print_json(record) if as_json else _show(record)
    facts: dict[str, Any] = read_facts(source).model_dump(mode="json")
    if as_json:
        return print_json(facts)
    table = Table(show_header=False, box=None, pad_edge=False)
    for name in ("model", "texts", "dtype", "num_rows"):
        table.add_row(name, f"{facts[name]:,}" if name == "num_rows" else str(facts[name]))
    table.add_row("hooks", ", ".join(f"{hook} ({width})" for hook, width in facts["hooks"].items()))
    table.add_row("shards", str(len(facts["shards"])))
    out.print(table)


def _show(record: dict[str, Any]) -> None:
    heads = ("dictionary", "method", "atoms", "FVU", "expl. var.", "L0", "dead", "dense", "CE-loss score")
    table = Table(*heads, box=None, pad_edge=False)
    for one in record["dictionaries"]:
        found, tokens = one["metrics"], None
        cells = ["-"] * 6
        if found is not None:
            score, tokens = found["ce_loss_score"], found["num_tokens"]
            cells = [f"{found['fvu']:.3f}", f"{found['explained_variance']:.3f}", f"{found['l0']:.1f}"]
            dense = "-" if found.get("dense") is None else f"{found['dense']:.1%}"
            cells += [f"{found['dead']:.1%}", dense, "-" if score is None else f"{score:.3f}"]
        table.add_row(one["name"], one["method"], f"{one['dict_size']:,}", *cells)
    out.print(table)
    if tokens is not None:
        out.print(f"  Dead: in none of the codes of {tokens:,} held-out tokens; dense: in over 10 %.", markup=False)


def _show_asked(record: dict[str, Any]) -> None:
    for one in record["dictionaries"]:
        asked = one["asked"]
        for name in ("mcc", "stability"):
            if name in asked:
                out.print(f"  {one['name']}: {name} {_said(asked[name])}", markup=False)
        if "letters" in asked:
            found = asked["letters"]
            said = [f"{k} {_said(value)}" for k, value in found["probe"].items()]
            said += [f"all of the activation {_said(found['dense'])}"]
            out.print(f"  {one['name']}: letters {found['letters']} told by features: {', '.join(said)}", markup=False)
            absorbed = found["absorption"]
            what = absorbed.get("none") or f"full {_said(absorbed['full'])}, fraction {_said(absorbed['fraction'])}"
            out.print(f"  {one['name']}: absorption {what}", markup=False)
    for group in record["seeds"]:
        figures = {
            name: group["metrics"][name] for name in ("fvu", "l0", "dead", "ce_loss_score") if name in group["metrics"]
        }
        said = [f"{name} {_said(value)}" for name, value in figures.items()]
        said += [f"stability {_said(group['stability'])}"]
        out.print(f"  Over {len(group['names'])} seeds: {', '.join(said)}", markup=False)


def _said(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    interval = "" if estimate["low"] is None else f" ({estimate['low']:.3f} to {estimate['high']:.3f})"
    return f"{estimate['value']:.3f}{interval}"
