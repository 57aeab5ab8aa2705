"""Essential sparsity: how much a model loses for nothing when its smallest weights go at once, and where it breaks.

Paper: Jaiswal et al. 2023, https://arxiv.org/abs/2306.03805, section 3: one-shot magnitude over all layers together,
without retraining; the essential sparsity is the sharp dropping point beyond which performance declines much faster.
The paper reads that point off its figures. Here it is computed, twice, from the share of quality that is kept,
``(quality - chance) / (dense quality - chance)``, which has no unit and falls for accuracies and losses alike:

- the knee: where the two lines of the best broken line meet, over the points down to the first that keeps half or
  less. What comes after is the second turn, where a broken model approaches chance, and says nothing of the first.
- the tolerated sparsity: where more than 1 % is lost for the first time, the tolerance of the paper's text.

The knee does not depend on a tolerance, and says how sharp it is by its slopes; the tolerated sparsity is there also
for a curve that never breaks, or has too few points for two lines. Not implemented: the fine-tuning on a task that the
paper does after pruning an encoder; its language models (Vicuna) are measured as here, without.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_divides, check_int, check_range, check_sparsity, fail
from ..measure.quality import bits_per_byte
from ..measure.tokens import Progress, context_length
from ..models.load import Loaded
from ..models.sites import Site, find_sites
from ..ops.formats import Masks
from ..ops.knee import Knee, knee, last_above
from ..ops.select import global_topk_masks, nm_mask
from .magnitude import magnitude_score
from .matrices import as_matrices, from_matrices

Measure = Callable[[nn.Module], float]
Order = Literal["magnitude", "random"]
SPARSITIES = tuple(step / 20 for step in range(1, 20))
"""The grid if none is given: 5 % to 95 %."""


@dataclass(frozen=True)
class Point:
    """A model at one sparsity.

    Attributes:
        pattern: ``dense``, ``unstructured`` or ``n:m``.
        sparsity: zeros of the weights considered, counted in the model.
        quality: what the measure said.
        kept: share of what the dense model has over chance, at least 0.
    """

    pattern: str
    sparsity: float
    quality: float
    kept: float


@dataclass(frozen=True)
class Curve:
    """The quality of a model as its weights go.

    Attributes:
        order: which weights go first.
        pattern: ``unstructured`` or ``n:m`` with the block's m.
        points: the model as it was, then sparser and sparser.
        chance: quality of a guess.
        drop: share of quality that is tolerated.
        knee: None where the curve does not turn downwards.
        tolerated: highest sparsity before more than ``drop`` is lost, between two points on a straight line.
        notes: what the user should know.
    """

    order: Order
    pattern: str
    points: tuple[Point, ...]
    chance: float
    drop: float
    knee: Knee | None
    tolerated: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; a ratio of slopes is None where the curve does not fall before the knee."""
        found = None
        if self.knee is not None:
            ratio = self.knee.ratio if math.isfinite(self.knee.ratio) else None
            found = {
                "sparsity": self.knee.x,
                "kept": self.knee.y,
                "slope_before": self.knee.slope_before,
                "slope_after": self.knee.slope_after,
                "ratio": ratio,
                "num_points": self.knee.num_points,
            }
        return {
            "order": self.order,
            "pattern": self.pattern,
            "knee": found,
            "tolerated_sparsity": self.tolerated,
            "drop": self.drop,
            "chance": self.chance,
            "points": [vars(point) for point in self.points],
            "notes": list(self.notes),
        }


def essential_sparsity(
    model: nn.Module,
    measure: Measure,
    *,
    chance: float,
    m: int | None = None,
    sparsities: Sequence[float] | None = None,
    order: Order = "magnitude",
    sites: Collection[str] = ("linear",),
    drop: float = 0.01,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Curve:
    """Prune in one shot to one sparsity after the other, from the weights as they are, and measure each time.

    Args:
        model: any module; its weights are afterwards as before.
        measure: quality of a model, of either sense: the dense model must be on one side of ``chance``.
        chance: what ``measure`` gives for a guess, such as 0.1 for the accuracy among ten classes.
        m: None prunes all sites in one competition; a number keeps n of every m consecutive inputs, n = m - 1 ... 1.
        sparsities: rising fractions removed, `SPARSITIES` if not given; with ``m`` they follow from it.
        order: ``magnitude``, or ``random`` as the control of equal sparsity.
        sites: kinds or groups of `paucity.models.sites`.
        drop: share of quality that is tolerated, in (0, 1).
        seed: of the random order.
        on_progress: called with (points done, points in all).

    Returns:
        The curve. A model that is sparse already is measured from there: lower sparsities are left out, and a note says
        so.

    Raises:
        InputError: if an argument is out of range, m does not divide a site's input size, the model has no such site,
            its weights or what ``measure`` returns are no numbers, or the dense model is no better than chance.
    """
    check_choice("essential_sparsity", "order", order, get_args(Order))
    check_range("essential_sparsity", "chance", chance)
    check_range("essential_sparsity", "drop", drop, 0, 1, open_low=True, open_high=True)
    found = find_sites(model, sites)
    levels = _levels(model, found, m, sparsities)
    scores = _scores(model, found, order, seed)
    dense = {site.name: model.get_parameter(site.name).detach().clone() for site in found}
    everything = Masks({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in dense.items()})
    start = everything.achieved_in(model).achieved
    qualities = [("dense", start, _measured(measure, model))]
    if qualities[0][2] == chance or math.isinf(qualities[0][2]):
        raise fail("essential_sparsity", "model", f"be better than chance ({chance:g}) before pruning", qualities[0][2])
    try:
        for done, (label, level) in enumerate(levels):
            if on_progress is not None:
                on_progress(done, len(levels))
            masks = _masks(model, found, scores, m, level)
            reached = _zeros_with(masks, dense)
            if reached > qualities[-1][1]:
                masks.apply_(model)
                qualities.append((label, reached, _measured(measure, model)))
                _restore(model, dense)
    finally:
        _restore(model, dense)
    return _curve(qualities, len(levels), order, "unstructured" if m is None else f"n:{m}", chance, drop)


def text_measure(
    loaded: Loaded, text: str, *, max_tokens: int = 8192, length: int | None = None, stride: int | None = None
) -> tuple[Measure, float]:
    """Bits per byte of ``text`` as a measure, and what guessing all tokens with equal chance costs.

    Args:
        loaded: the model that gives the tokenizer, dense or not.
        text: to measure on.
        max_tokens: of the text, from its start.
        length: of a window; None is 1024, or the model's context where that is less.
        stride: between two windows; None is half a length.

    Returns:
        (the measure, the bits per byte of a guess).

    Raises:
        InputError: as `paucity.measure.quality.bits_per_byte`.
    """
    tokenizer = loaded.need_tokenizer("text_measure")
    length = min(1024, context_length(loaded.model) or 1024) if length is None else length
    stride = max(1, length // 2) if stride is None else stride

    def measure(model: nn.Module) -> float:
        found = bits_per_byte(model, tokenizer, text, length=length, stride=stride, max_tokens=max_tokens)
        return math.inf if found.bits_per_byte is None else found.bits_per_byte.value

    first = bits_per_byte(loaded.model, tokenizer, text, length=length, stride=stride, max_tokens=max_tokens)
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
    return measure, math.log2(vocabulary) * first.num_tokens / (first.num_bytes or first.num_tokens)


def _levels(
    model: nn.Module, sites: Sequence[Site], m: int | None, sparsities: Sequence[float] | None
) -> list[tuple[str, float]]:
    if m is None:
        grid = SPARSITIES if sparsities is None else sparsities
        for sparsity in grid:
            check_sparsity("essential_sparsity", sparsity, "sparsities")
        if not grid or any(a >= b for a, b in pairwise(grid)):
            raise fail("essential_sparsity", "sparsities", "rise", list(grid))
        return [("unstructured", sparsity) for sparsity in grid]
    if sparsities is not None:
        raise fail("essential_sparsity", "sparsities", "be left out with m", list(sparsities))
    check_int("essential_sparsity", "m", m, 2)
    for site in sites:
        check_divides("essential_sparsity", "m", m, _inputs(model, site), f"the input size of {site.name}")
    return [(f"{n}:{m}", 1 - n / m) for n in range(m - 1, 0, -1)]


def _inputs(model: nn.Module, site: Site) -> int:
    """How many consecutive inputs a row has: of a convolution the input channels."""
    return model.get_parameter(site.name).shape[1] if site.kind == "conv" else as_matrices(model, site).shape[-1]


def _scores(model: nn.Module, sites: Sequence[Site], order: Order, seed: int) -> dict[str, Tensor]:
    """Scores in the parameters' layout."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for site in sites:
        weight = model.get_parameter(site.name).detach()
        if not bool(weight.isfinite().all()):
            raise fail("essential_sparsity", "model", "have finite weights", f"NaN or infinity in {site.name}")
        drawn = torch.rand(weight.shape, generator=generator) if order == "random" else None
        scores[site.name] = magnitude_score(weight) if drawn is None else drawn.to(weight.device)
    return scores


def _masks(model: nn.Module, sites: Sequence[Site], scores: dict[str, Tensor], m: int | None, level: float) -> Masks:
    if m is None:
        return Masks(global_topk_masks(scores, sparsity=level), nominal=level)
    n = round(m * (1 - level))
    masks = {}
    for site in sites:
        rows = as_matrices(model, site, scores[site.name])
        size = _inputs(model, site)
        kept = nm_mask(rows.reshape(-1, size), n=n, m=m).view(rows.shape)
        masks[site.name] = from_matrices(model, site, kept)
    return Masks(masks, nominal=level)


def _zeros_with(masks: Masks, dense: dict[str, Tensor]) -> float:
    zeros = sum(int(((weight == 0) | ~masks[name]).sum()) for name, weight in dense.items())
    return zeros / sum(weight.numel() for weight in dense.values())


def _measured(measure: Measure, model: nn.Module) -> float:
    value = float(measure(model))
    if math.isnan(value):
        raise fail("essential_sparsity", "measure", "return a number", value)
    return value


@torch.no_grad()
def _restore(model: nn.Module, dense: dict[str, Tensor]) -> None:
    for name, weight in dense.items():
        model.get_parameter(name).copy_(weight)


def _curve(
    qualities: list[tuple[str, float, float]], asked: int, order: Order, pattern: str, chance: float, drop: float
) -> Curve:
    over = qualities[0][2] - chance
    points = [
        Point(label, sparsity, quality, 0.0 if math.isinf(quality) else max(0.0, (quality - chance) / over))
        for label, sparsity, quality in qualities
    ]
    x, y = [point.sparsity for point in points], [point.kept for point in points]
    notes = [f"The model was {x[0]:.1%} sparse before."] if x[0] > 0.001 else []
    if len(points) <= asked:
        notes.append(f"{asked + 1 - len(points)} patterns asked for remove nothing more and were left out.")
    tolerated = last_above(x, y, level=1 - drop)
    assert tolerated is not None  # the first point keeps all
    return Curve(order, pattern, tuple(points), chance, drop, knee(x, y, until=0.5), tolerated, tuple(notes))
