"""Dictionaries on a model: harvest its places in one pass, train all that are asked for on the same rows, measure.

For each place a sweep (every size with every k, l1 and seed) is trained side by side on the same batches. With a folder
to keep what is done, a job that was killed goes on within the harvest, within a training, and behind each of them.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..checks import check_int, fail
from ..measure.tokens import encode, leading_ids
from ..models.calibration import stacked
from ..models.places import find_places
from .base import Dictionary, Progress
from .build import accepts, build
from .cache import cached_source, write_cache
from .live import Harvester
from .mixing import MixedSource
from .sae import SparseAutoencoder
from .trainer import Trained, train

Tell = Callable[[int, int, str], object]
Count = Annotated[int, Field(ge=1)]
TOKENS_OF_A_FORWARD = 2048


class Options(BaseModel):
    """What is trained at which places of a model, and how; several values of a field are a sweep."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    hooks: tuple[str, ...] = Field(default=(), description="places; the residual stream of the middle block if empty")
    dict_size: tuple[Count, ...] = Field(default=(), description="atoms; 8 times the width if empty")
    k: tuple[Count, ...] = Field(default=(), description="entries of a code; the method's own if empty")
    l1: tuple[float, ...] = Field(default=(), description="weight of a penalty; the method's own if empty")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1, description="of atoms and rows")
    num_tokens: Count = Field(default=1_000_000, description="activations that a training sees")
    batch_size: Count = Field(default=1024, description="activations of a step")
    learning_rate: float = Field(default=1e-3, gt=0, description="the highest of the schedule")
    capacity: Annotated[int, Field(ge=2)] = Field(default=65_536, description="rows of the buffer that mixes them")
    live: bool = Field(default=False, description="run the model while training, and keep no activations on disk")


@dataclass(frozen=True, eq=False)
class Fitted:
    """One dictionary that was trained.

    Attributes:
        hook: where.
        name: of the place and, in a sweep, what it differs by.
        method: in the catalogue.
        options: what it was built with.
        dictionary: trained, in eval mode.
        trained: the training, which is that of all at this place.
        number: of the dictionary within it.
    """

    hook: str
    name: str
    method: str
    options: dict[str, Any]
    dictionary: Dictionary
    trained: Trained
    number: int


def text_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int, *, max_tokens: int) -> list[Tensor]:
    """The start of a text in windows one after the other, stacked to forwards of about two thousand tokens.

    Args:
        tokenizer: what it puts before a text stands before each window.
        text: of at least one window.
        length: tokens of a window.
        max_tokens: of the text.

    Returns:
        ``[B, length]`` int64 each; what fills no window is left.
    """
    check_int("text_windows", "length", length, 2)
    head = torch.tensor(leading_ids(tokenizer), dtype=torch.int64)
    size = length - len(head)
    ids = torch.tensor(encode(tokenizer, text)[:max_tokens], dtype=torch.int64)
    if size < 1 or len(ids) < size:
        raise fail("text_windows", "text", f"have at least {size} tokens", len(ids))
    rows = ids[: len(ids) // size * size].view(-1, size)
    return stacked([torch.cat([head, row]).unsqueeze(0) for row in rows], most=TOKENS_OF_A_FORWARD)


def middle_hook(model: nn.Module) -> str:
    """The residual stream behind the middle block.

    Raises:
        InputError: if the model has no blocks, or several towers of which none is a language model.
    """
    layers = sorted(int(name.split(".")[1]) for name in find_places(model) if name.startswith("residual."))
    if not layers:
        raise fail("dictionary", "model", "have one row of blocks, or a hook be given", type(model).__name__)
    return f"residual.{layers[(len(layers) - 1) // 2]}"


def fit_on(
    model: nn.Module,
    method: str,
    options: Options,
    items: Sequence[Tensor],
    *,
    source: str,
    texts: str,
    skip_ids: Collection[int] = (),
    keep: Path | None = None,
    on_progress: Tell | None = None,
) -> list[Fitted]:
    """Train all dictionaries that ``options`` ask for.

    Args:
        model: run as it is.
        method: one of `build.learned`.
        options: see `Options`.
        items: what the model runs on, one forward each.
        source: where the model comes from.
        texts: what the items are, in words.
        skip_ids: token ids whose activations are left out.
        keep: a folder for activations and checkpoints; the same call goes on there after a kill. None keeps nothing,
            and runs the model while training.
        on_progress: told what is done, of how much, and in words.

    Raises:
        InputError: if the method, an option, a hook or an item does not fit, or ``keep`` holds activations of another
            model or other items; before anything is trained.
    """
    tell = on_progress or _silent
    hooks = options.hooks or (middle_hook(model),)
    harvester = Harvester(model, hooks, items, skip_ids=skip_ids)
    plans = [_sweep(method, options, width) for width in harvester.widths]
    made = [
        [build(method, width, size, given) for _, size, given in plan]
        for width, plan in zip(harvester.widths, plans, strict=True)
    ]
    if any(one.needs_gradient for plan in made for one in plan):
        raise fail("dictionary", "method", "need no gradients (train it from Python, with a source of them)", method)
    if keep is not None and not options.live:
        write_cache(keep / "activations", harvester, model=source, texts=texts, resume=True, on_progress=tell)
    found = []
    for place, (hook, plan, each) in enumerate(zip(hooks, plans, made, strict=True)):
        stream = _stream(model, hook, items, skip_ids, options, keep)

        def show(progress: Progress, place: int = place, hook: str = hook) -> None:
            done = place * progress.total + progress.step
            tell(done, len(hooks) * progress.total, f"{hook}: {said(progress)}")

        trained = _trained(each, stream, options, None if keep is None else keep / f"training-{place}", show)
        for number, ((suffix, _, given), one) in enumerate(zip(plan, each, strict=True)):
            found.append(Fitted(hook, "-".join([hook, *suffix]), method, given, one, *trained[number]))
    return found


def _trained(
    each: Sequence[Dictionary],
    stream: MixedSource,
    options: Options,
    keep: Path | None,
    show: Callable[[Progress], None],
) -> list[tuple[Trained, int]]:
    """Autoencoders side by side; what finds its atoms in another way by its own `fit`, one after the other."""
    how: dict[str, Any] = {
        "num_tokens": options.num_tokens,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "on_progress": show,
    }
    if all(isinstance(one, SparseAutoencoder) for one in each):
        trained = train(each, stream, keep=keep, **how)
        return [(trained, number) for number in range(len(each))]
    folders = [None if keep is None else keep / str(number) for number in range(len(each))]
    return [(one.fit(stream, keep=folder, **how), 0) for one, folder in zip(each, folders, strict=True)]


def said(progress: Progress) -> str:
    """FVU, L0 and the share of silent atoms in a line; of several dictionaries the range."""
    dead = _range([100 * share for share in progress.silent])
    return f"FVU {_range(progress.fvu)}, L0 {_range(progress.l0)}, dead {dead} %"


def _range(values: Sequence[float]) -> str:
    low, high = (f"{end:.3g}" for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _stream(
    model: nn.Module, hook: str, items: Sequence[Tensor], skip_ids: Collection[int], options: Options, keep: Path | None
) -> MixedSource:
    if keep is not None and not options.live:
        return cached_source(keep / "activations", hook, capacity=options.capacity, seed=options.seeds[0])
    harvester = Harvester(model, hook, items, skip_ids=skip_ids)
    return MixedSource(
        harvester.rows, harvester.counts, harvester.widths[0], capacity=options.capacity, seed=options.seeds[0]
    )


def _sweep(method: str, options: Options, width: int) -> list[tuple[list[str], int, dict[str, Any]]]:
    """What the name of each dictionary adds, its size, and what it is built with."""
    sizes = options.dict_size or (8 * width,)
    given: dict[str, Sequence[Any]] = {"k": options.k, "l1": options.l1}
    axes = {name: values for name, values in given.items() if values} | {"seed": options.seeds}
    # An atom that an eighth of the training does not use is dead, as far as this training can tell.
    patience = max(1, min(10_000_000, math.ceil(options.num_tokens / 8)))
    fixed = {"silent_after": patience} if accepts(method, "silent_after") else {}
    found = []
    for size, *values in product(sizes, *axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        suffix = [f"size{size}"] if len(sizes) > 1 else []
        suffix += [f"{name}{chosen[name]:g}" for name in axes if len(axes[name]) > 1]
        found.append((suffix, size, chosen | fixed))
    return found


def _silent(done: int, total: int, what: str) -> None:
    """Progress that nobody watches."""


def measured_notes(name: str, figures: dict[str, Any]) -> Iterator[str]:
    """What `judge` found, in a sentence or two."""
    yield (
        f"{name}: FVU {figures['fvu']:.3f}, explained variance {figures['explained_variance']:.3f}, "
        f"L0 {figures['l0']:.1f}, {100 * figures['dead']:.1f} % of the atoms in none of "
        f"{figures['num_tokens']:,} codes."
    )
    if figures["ce_loss_score"] is not None:
        yield f"{name}: {100 * figures['ce_loss_score']:.1f} % of the loss that zeros would cost is recovered."
