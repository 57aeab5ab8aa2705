"""``paucity attention``: look at what a policy does to a prompt, find where it begins to gain, search one by head."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .cli_output import Json, check_target, out, print_json, spinner

if TYPE_CHECKING:
    from torch import Tensor

    from .models.load import Loaded

app = typer.Typer(
    help="Sparse attention: see what a policy reads, and find one for a model.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Policy = Annotated[str, typer.Argument(help="A method by name, or a JSON or YAML file with `method` and its options.")]
Model = Annotated[str, typer.Option(help="A folder, a hub id or 'embedded'.")]
Text = Annotated[str, typer.Option(help="A built-in text or a UTF-8 file.")]


@app.command()
def observe(
    policy: Policy,
    model: Model = "embedded",
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 4096,
    text: Text = "held_out_python",
    as_json: Json = False,
) -> None:
    """What a policy does to one prompt in every layer: density, recall of attention mass, error, times."""
    from .attention import apply
    from .attention import observe as look

    chosen, loaded, ids = _prepare(policy, model, text, tokens)
    with spinner() as progress:
        progress(f"{tokens} tokens, dense and sparse")
        seen = look(apply(loaded.model, chosen.model_copy(update={"min_length": 0})), ids)
    rows: list[dict[str, Any]] = [
        {
            "layer": entry.layer,
            "density": entry.density.tolist(),
            "recall": None if entry.recall is None else entry.recall.tolist(),
            "output_error": entry.output_error.tolist(),
            "seconds": entry.seconds,
            "select_seconds": entry.select_seconds,
            "dense_seconds": entry.dense_seconds,
        }
        for entry in seen
    ]
    if as_json:
        return print_json(rows)
    table = Table(
        "layer", "density", "recall", "error", "dense ms", "sparse ms", "choosing ms", box=None, pad_edge=False
    )
    for row in rows:
        means = (_mean(row[name]) for name in ("density", "recall", "output_error"))
        times = (f"{1e3 * row[name]:.2f}" for name in ("dense_seconds", "seconds", "select_seconds"))
        table.add_row(str(row["layer"]), *means, *times)
    out.print(table)


@app.command()
def crossover(
    policy: Policy,
    model: Model = "embedded",
    text: Text = "held_out_python",
    longest: Annotated[int, typer.Option(min=2, help="Longest prompt; halved five times.")] = 8192,
    as_json: Json = False,
) -> None:
    """From which prompt length on a policy is faster than dense attention here: its `min_length`."""
    from .attention import crossover as measure

    chosen, loaded, ids = _prepare(policy, model, text, longest)
    lengths = sorted({max(1, longest >> halving) for halving in range(6)})
    with spinner() as progress:
        progress(f"prompts of {lengths[0]} to {lengths[-1]} tokens, dense and sparse in turns")
        found = measure(loaded.model, chosen, ids, lengths=lengths)
    if as_json:
        rows = [
            {"tokens": length, "seconds": times.sparse, "select_seconds": times.select, "dense_seconds": times.dense}
            for length, times in zip(found.lengths, found.seconds, strict=True)
        ]
        return print_json({"crossover": found.tokens, "lengths": rows})
    table = Table("tokens", "dense ms", "sparse ms", "choosing ms", "ratio", box=None, pad_edge=False)
    for length, times in zip(found.lengths, found.seconds, strict=True):
        shown = (f"{1e3 * value:.2f}" for value in (times.dense, times.sparse, times.select))
        table.add_row(str(length), *shown, f"{times.dense / times.sparse:.2f}")
    out.print(table)
    where = f"from {found.tokens} tokens on" if found.tokens else "at none of these lengths"
    out.print(f"Faster than dense attention {where}.", highlight=False)


@app.command()
def search(
    method: Policy,
    target: Annotated[Path, typer.Option("--out", help="JSON file of the policy that is found.")],
    model: Model = "embedded",
    text: Text = "python",
    tokens: Annotated[int, typer.Option(min=2, help="Length of a calibration text.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Calibration texts.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the calibration texts.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace --out.")] = False,
) -> None:
    """Find a policy for a model by looking at it, head by head, and save it for recipes (`method: per_head`)."""
    from .attention import PolicySearch, save_policy
    from .attention.portable import method_name
    from .checks import fail
    from .measure.data import read_text
    from .models.calibration import calibration_batches
    from .models.load import load

    check_target("attention search", target, force=force)
    options = _options(method)
    if not isinstance(options, PolicySearch):
        raise fail("attention search", "method", "be a search, not a policy", method_name(options))
    content = read_text(text, role="calibration")
    with spinner() as progress:
        progress(f"loading {model}")
        loaded = load(model)
        tokenizer = loaded.need_tokenizer("attention search")
        batches = calibration_batches(tokenizer, content, num_samples=samples, length=tokens, seed=seed)
        progress(f"{method_name(options)} on {samples} texts of {tokens} tokens")
        found = options.fit(loaded.model, batches)
    save_policy(found, target)
    out.print(f"Policy: {target}", markup=False, soft_wrap=True)


@app.command()
def speculate(
    draft: Policy,
    model: Model = "embedded",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to write.")] = 200,
    prompt: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 4096,
    num_draft: Annotated[int, typer.Option(min=1, help="Tokens drafted for each pass that verifies.")] = 4,
    text: Text = "held_out_python",
    as_json: Json = False,
) -> None:
    """Write with a sparse draft that the dense model verifies: what it accepts, and the time against dense decoding."""
    from functools import partial

    from .attention import DecodePolicy
    from .attention.speculation import speculate as write
    from .checks import fail
    from .measure.cost import time_interleaved
    from .measure.data import read_text
    from .measure.tokens import check_context

    policy = _options(draft)
    if not isinstance(policy, DecodePolicy):
        raise fail("attention speculate", "draft", "be a policy of decode steps", draft)
    content = read_text(text, role="measure")
    with spinner() as progress:
        progress(f"loading {model}")
        loaded, ids = _prompt(model, content, prompt)
        check_context("attention speculate", "prompt and tokens", loaded.model, prompt + tokens)
        policy = policy.model_copy(update={"min_length": 0})
        spoken = partial(
            write, loaded.model, ids, draft=policy, num_draft=num_draft, max_new_tokens=tokens, eos_token_id=[]
        )
        progress(f"{tokens} tokens after {prompt}, dense and with a draft in turns")
        done = spoken()
        plain = partial(_decode, loaded, ids, tokens)
        same = bool((done.tokens[:, prompt:].cpu() == plain().cpu()).all())
        times = time_interleaved({"dense": plain, "speculation": spoken}, repeats=3)
    row = {
        "tokens_per_pass": done.tokens_per_step,
        "accepted": done.acceptance,
        "draft_density": done.draft_density,
        "draft_seconds": done.draft_seconds,
        "verify_seconds": done.verify_seconds,
        "seconds": times.timings["speculation"].median,
        "dense_seconds": times.timings["dense"].median,
        "same_as_dense": same,
    }
    if as_json:
        return print_json(row)
    for name, value in row.items():
        shown = f"{value:.3g}" if isinstance(value, float) else value
        out.print(f"{name.replace('_', ' ')}: {shown}", highlight=False)


def _decode(loaded: "Loaded", ids: "Tensor", tokens: int) -> "Tensor":
    """Greedy decoding ``[1, tokens]`` without a draft."""
    from .measure.cost import decode, prefill

    return decode(loaded.model, *prefill(loaded.model, ids), tokens)


def _prompt(model: str, content: str, tokens: int) -> "tuple[Loaded, Tensor]":
    """The model, and the first tokens of a text ``[1, tokens]``."""
    import torch

    from .checks import fail
    from .measure.tokens import encode, leading_ids
    from .models.load import load

    loaded = load(model)
    tokenizer = loaded.need_tokenizer("attention")
    ids = [*leading_ids(tokenizer), *encode(tokenizer, content)]
    if len(ids) < tokens:
        raise fail("attention", "text", f"have at least {tokens} tokens", len(ids))
    return loaded, torch.tensor([ids[:tokens]])


@app.command()
def heads(
    model: Model = "embedded",
    text: Text = "held_out_python",
    longest: Annotated[int, typer.Option(min=128, help="Longest prompt; halved twice.")] = 4096,
    depths: Annotated[int, typer.Option(min=1, help="Depths of the needle, for each task and length.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of needles and texts.")] = 0,
    as_json: Json = False,
) -> None:
    """Which heads copy answers out of a long text: their retrieval scores, the highest first."""
    from .attention import needle_prompts, retrieval_scores
    from .measure.data import read_text
    from .models.load import load

    content = read_text(text, role="measure")
    with spinner() as progress:
        progress(f"loading {model}")
        loaded = load(model)
        tokenizer = loaded.need_tokenizer("attention heads")
        lengths = sorted({longest >> halving for halving in range(3)})
        needles = needle_prompts(tokenizer, content, lengths=lengths, num_depths=depths, seed=seed)
        scores = retrieval_scores(
            loaded.model, needles, on_progress=lambda done, of: progress(f"{done} of {of} prompts answered")
        )
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    found = [(*divmod(at, scores.shape[1]), float(scores.flatten()[at])) for at in order]
    if as_json:
        return print_json([{"layer": layer, "head": head, "score": score} for layer, head, score in found])
    table = Table("layer", "head", "retrieval score", box=None, pad_edge=False)
    for layer, head, score in found:
        table.add_row(str(layer), str(head), f"{score:.3f}")
    out.print(table)
    share = sum(score > 0.1 for *_, score in found) / len(found)
    out.print(f"{100 * share:.0f} % of the {len(found)} heads score above 0.1.", highlight=False)


def _options(name: str) -> Any:
    """The policy or search called ``name``, or in the file of that name."""
    from .attention.portable import options_from, read_mapping

    path = Path(name)
    return options_from(read_mapping(path) if path.suffix in (".json", ".yaml", ".yml") else {"method": name})


def _prepare(name: str, model: str, text: str, tokens: int) -> "tuple[Any, Loaded, Tensor]":
    """The policy, the model and a prompt ``[1, tokens]``; whatever is wrong is said before any work."""
    from .attention import PrefillPolicy
    from .attention.portable import method_name
    from .checks import fail
    from .measure.data import read_text

    policy = _options(name)
    if not isinstance(policy, PrefillPolicy):
        constraint = "be a policy of prompts (`paucity attention search` makes one)"
        raise fail("attention", "policy", constraint, method_name(policy))
    content = read_text(text, role="measure")
    with spinner() as progress:
        progress(f"loading {model}")
        loaded, ids = _prompt(model, content, tokens)
    return policy, loaded, ids


def _mean(values: list[float] | None) -> str:
    return "–" if values is None else f"{100 * sum(values) / len(values):.1f} %"
