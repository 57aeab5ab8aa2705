"""Which heads, neurons and layers stay: scores, how much each layer keeps, and the choice."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...checks import InputError, check_divides, fail
from ...models.blocks import sites_by_block
from ...models.sites import find_sites, weight_view
from ...ops import budget
from ...ops.budget_blocks import by_importance
from ...ops.select import num_kept, topk_mask
from ..wanda import wanda_score
from .cfsp import cfsp_score, coarse_importance, largest_remainder
from .influence import Statistics, gather
from .layouts import find_units
from .options import CfspOptions, HeadsOptions, LayersOptions, NeuronsOptions
from .scores import output_sites, unit_scores
from .shrinking import whole_rows
from .units import Units

_NEAR = 0.01
"""What is removed may miss the sparsity by this much without a note."""


@dataclass
class Choice:
    """What stays of a model.

    Attributes:
        kept: units and their masks.
        layers: indices of whole layers to remove.
        statistics: of the dense model, where they were needed.
        notes: what the user should know.
    """

    kept: list[tuple[Units, Tensor]] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    statistics: Statistics | None = None
    notes: list[str] = field(default_factory=list)


def choose_heads(model: nn.Module, options: HeadsOptions, calibration: Sequence[Tensor]) -> Choice:
    """Of every layer the same number of groups, or of queries in each group."""
    found = find_units(model, "heads")
    if len({units.sizes for units in found}) > 1:
        raise fail("heads", "model", "have the same number of heads in every layer", [units.sizes for units in found])
    groups, each = found[0].sizes
    if options.unit == "query" and each == 1:
        raise fail("heads", "unit", "be group in a model whose queries share no keys", options.unit)
    size = groups if options.unit == "group" else each
    count = _count("heads", size, options.sparsity, f"{options.unit} heads")
    choice = Choice(notes=_nothing(size, count, f"{options.unit} heads"))
    scores = _scores(model, found, options.score, calibration, choice, options.seed)
    for units in found:
        score = scores[units.module]
        if options.unit == "group":
            kept = topk_mask(score.sum(1), k=count).unsqueeze(1).expand(groups, each).clone()
        else:
            kept = topk_mask(score, k=count, dim=1)
        choice.kept.append((units, kept))
    return choice


def choose_neurons(model: nn.Module, options: NeuronsOptions, calibration: Sequence[Tensor]) -> Choice:
    """Of every feed-forward network, and of every expert, as many as the allocation gives it."""
    found, choice = _networks(model), Choice()
    if options.allocation != "uniform" or options.score in ("activation", "cfsp"):
        sites = find_sites(model, ("linear",)) if options.allocation == "owl" else output_sites(model, found)
        choice.statistics = gather(model, sites, calibration)
    if options.score == "cfsp":
        assert choice.statistics is not None
        scores = _fine(model, found, choice.statistics, CfspOptions())
    else:
        scores = _scores(model, found, options.score, calibration, choice, options.seed)
    shapes = {units.module: units.sizes for units in found}
    sparsity = dict.fromkeys(shapes, options.sparsity)
    if options.allocation == "cfsp":
        sparsity = _coarse(model, found, choice.statistics, options.sparsity, options.sharpness)
    elif options.allocation == "owl":
        ratios = _outliers(model, choice.statistics)
        by_module = {units.module: ratios[units.layer] for units in found}
        sparsity = budget.owl(shapes, sparsity=options.sparsity, outlier_ratio=by_module)
    return _keep(model, found, scores, sparsity, options.sparsity, options.round_to, choice)


def choose_cfsp(model: nn.Module, options: CfspOptions, calibration: Sequence[Tensor]) -> Choice:
    """Coarse and fine, from one pass."""
    found = _networks(model)
    choice = Choice(statistics=gather(model, output_sites(model, found), calibration))
    assert choice.statistics is not None
    scores = _fine(model, found, choice.statistics, options)
    sparsity = _coarse(model, found, choice.statistics, options.sparsity, options.sharpness)
    return _keep(model, found, scores, sparsity, options.sparsity, options.round_to, choice)


def choose_layers(model: nn.Module, options: LayersOptions, calibration: Sequence[Tensor]) -> Choice:
    """The layers that turn their hidden states least go."""
    sites = [site for site in find_sites(model, ("linear",)) if site.layer is not None]
    number = 1 + max((site.layer or 0 for site in sites), default=0)
    count = _count("layers", number, options.sparsity, "layers")
    choice = Choice(notes=_nothing(number, count, "layers"))
    if options.score == "random":
        score = torch.rand(number, generator=torch.Generator().manual_seed(options.seed))
    else:
        choice.statistics = gather(model, sites[:1], calibration)
        score = torch.tensor(getattr(choice.statistics, options.score))
    choice.layers = (~topk_mask(score, k=count)).nonzero().squeeze(-1).tolist()
    return choice


def _networks(model: nn.Module) -> list[Units]:
    """Feed-forward networks and stacks of experts, block by block."""
    found: list[Units] = []
    for kind in ("neurons", "expert_neurons"):
        try:
            found += find_units(model, kind)
        except InputError:
            kinds = {site.kind for site in find_sites(model)}
            if ("down" if kind == "neurons" else "expert_down") in kinds:
                raise  # there are some, of a layout that cannot be cut
    if not found:
        raise fail("neurons", "model", "have feed-forward networks of a known layout", type(model).__name__)
    return found


def _scores(
    model: nn.Module, found: Sequence[Units], score: str, calibration: Sequence[Tensor], choice: Choice, seed: int
) -> dict[str, Tensor]:
    if score == "activation" and choice.statistics is None:
        choice.statistics = gather(model, output_sites(model, found), calibration)
    norms = choice.statistics.norms if choice.statistics is not None else None
    return unit_scores(model, found, score, norms=norms, batches=calibration, seed=seed)


def _keep(
    model: nn.Module,
    found: Sequence[Units],
    scores: Mapping[str, Tensor],
    sparsity: Mapping[str, float],
    target: float,
    round_to: int,
    choice: Choice,
) -> Choice:
    """The best neurons of every network, in whole steps: at least one, whatever the allocation says."""
    steps = {units.module: math.lcm(round_to, whole_rows(model, units)) for units in found}
    for units in found:
        step, size = steps[units.module], units.sizes[-1]
        check_divides("neurons", "round_to", step, size, f"the neurons of {units.module}")
        _count("neurons", size // step, target, f"neurons (in steps of {step})")
    counts = _step_counts(found, steps, sparsity)
    for units in found:
        count = steps[units.module] * counts[units.module]
        choice.kept.append((units, topk_mask(scores[units.module], k=count, dim=-1)))
    kept = sum(int(mask.sum()) for _, mask in choice.kept)
    every = sum(mask.numel() for _, mask in choice.kept)
    choice.notes += _nothing(every, kept, "neurons")
    if kept < every and abs(1 - kept / every - target) > _NEAR:
        gone, taken = (
            f"{1 - kept / every:.1%} of the neurons were removed",
            ", ".join(map(str, sorted({*steps.values()}))),
        )
        choice.notes.append(f"{gone}, {target:.1%} were asked for: they go in steps of {taken}.")
    return choice


def _step_counts(found: Sequence[Units], steps: Mapping[str, int], sparsity: Mapping[str, float]) -> dict[str, int]:
    """How many steps of neurons every network keeps: where all shares are equal, alike networks keep equally many.

    Where they are not, networks whose steps are equal parts keep as many together as their shares say.
    """
    whole = {units.module: units.sizes[-1] // steps[units.module] for units in found}
    if len(set(sparsity.values())) == 1:
        return {name: max(1, num_kept(size, sparsity[name])) for name, size in whole.items()}
    alike: dict[tuple[object, ...], list[str]] = {}
    for units in found:
        alike.setdefault((units.kind, units.sizes[:-1], steps[units.module]), []).append(units.module)
    counts: dict[str, int] = {}
    for names in alike.values():
        fair = [whole[name] * (1 - sparsity[name]) for name in names]
        counts |= dict(zip(names, largest_remainder(fair), strict=True))
    return counts


def _fine(model: nn.Module, found: Sequence[Units], statistics: Statistics, options: CfspOptions) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    powers = {"weight_power": options.weight_power, "power": options.power}
    for units in found:
        down = weight_view_of(model, units.output.parameter, units.output.dim)
        norm = statistics.norms[units.output.parameter]
        ins = [
            weight_view_of(model, slot.parameter, slot.dim).mT[..., entries(units.sizes)[:, 0].to(down.device), :]
            for slot in units.slots
            if not slot.output and slot.name != "bias"
            for _, entries in slot.sets
        ]
        if units.kind == "neurons":
            result[units.module] = cfsp_score(down, ins, norm, relative=options.relative, **powers).cpu()
            continue
        each = [
            cfsp_score(down[e], [part[e] for part in ins], norm[e], relative=options.relative, **powers).cpu()
            for e in range(len(down))
        ]
        result[units.module] = torch.stack(each)
    return result


def weight_view_of(model: nn.Module, name: str, dim: int) -> Tensor:
    """A weight with the dimension ``dim`` last."""
    weight = model.get_parameter(name).detach()
    return weight if dim == weight.ndim - 1 else weight.mT


def _coarse(
    model: nn.Module, found: Sequence[Units], statistics: Statistics | None, sparsity: float, sharpness: float
) -> dict[str, float]:
    assert statistics is not None  # gathered for this allocation
    blocks = coarse_importance(statistics.angular)
    importance = {units.module: blocks[units.layer] for units in found}
    shapes = {units.module: units.sizes for units in found}
    return by_importance(shapes, sparsity=sparsity, importance=importance, sharpness=sharpness)


def _outliers(model: nn.Module, statistics: Statistics | None) -> dict[int, float]:
    """Share of outliers among the Wanda scores of a block, as in OWL."""
    assert statistics is not None  # gathered for this allocation
    ratios: dict[int, float] = {}
    for _, group in sites_by_block(find_sites(model, ("linear",))):
        scores = [wanda_score(weight_view(model, site), statistics.norms[site.name]).flatten() for site in group]
        ratios[group[0].layer or 0] = budget.outlier_ratio(torch.cat(scores))
    return ratios


def _count(function: str, size: int, sparsity: float, what: str) -> int:
    count = num_kept(size, sparsity)
    if count < 1:
        raise fail(function, "sparsity", f"leave at least one of {size} {what}", f"{sparsity:.4g}")
    return count


def _nothing(size: int, kept: int, what: str) -> list[str]:
    return [f"Nothing was removed: the fraction is less than half of one of {size} {what}."] if kept == size else []
