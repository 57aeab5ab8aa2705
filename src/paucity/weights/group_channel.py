"""Group channel pruning: norms' scales trained to zero at a varying rate, a threshold for each group of layers, and
attention maps of the dense network to recover by.

Paper: Chu et al. 2022, https://arxiv.org/abs/2306.01526; what the text leaves open is taken from the authors' code.
Three stages:

1. Dynamic sparse training: loss + s sum |gamma| over the norms' scales. From 40 % of the training on, the channels
   whose scale is in the upper 35 % of all get a hundredth of the rate, so that what will stay is not held down.
2. Group channel pruning: layers are grouped by the size of their feature maps and the part of the network that they
   belong to; each group has a threshold of its own on |gamma|. Layers joined by a shortcut keep what any of them wants.
   The authors set five fractions by hand (0.18, 0.5, 0.97, 0.865, 0.68 in YOLOv4); here `group_sparsities` finds them.
3. Spatial-attention distilling: A = normalise(mean_c F_c^2), flattened over the places, of one map a group, and
   loss + sum_g beta_g ||A_teacher - A_student||^2 (see `attention_loss` for the authors' beta).

Not implemented: moving the activation of removed channels' shift into the next layers; distilling boxes and classes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_range, check_sparsity, fail
from ..measure.images import Images
from ..measure.tokens import evaluating
from ..ops import budget
from ..ops.select import global_topk_masks, num_kept, topk_mask
from ..training import Loss, train
from .attention_maps import attention_loss
from .group_scales import VaryingRate, scale_scores, scales_of, sparse_scales
from .structured.channels_groups import channel_groups
from .structured.channels_shrink import ChannelGroup, channel_masks, shrink_channels, shrunk_tensors

Division = Mapping[str, Sequence[str]]
"""Name of a group of layers to the names of its channel groups."""
_RATE = VaryingRate()


@dataclass(frozen=True)
class GroupPruned:
    """A network after the three stages.

    Attributes:
        model: the small one.
        teacher: the dense one after sparse training.
        sparsities: fraction of the channels removed from each group of layers.
        parameters: share of the parameters that is left.
    """

    model: nn.Module
    teacher: nn.Module
    sparsities: dict[str, float]
    parameters: float


def group_channel_prune(
    model: nn.Module,
    images: Images,
    *,
    parameters: float = 0.353,
    parts: Collection[str] = (),
    rate: VaryingRate = _RATE,
    sparse_epochs: int = 20,
    distil_epochs: int = 20,
    learning_rate: float = 0.05,
    batch_size: int = 128,
    beta: float = 1.0,
    loss: Loss | None = None,
    seed: int = 0,
) -> GroupPruned:
    """All three stages on a trained network, which is left as it is.

    Args:
        model: a trained network of convolutions with norms; classifier, or any with a ``loss`` of its own.
        images: to train on; the first 256 measure what a threshold costs.
        parameters: share of the parameters to be left; the paper's 64.7 % removed by default.
        parts: see `divide`.
        rate: of the sparse training.
        sparse_epochs: of the first stage.
        distil_epochs: of the third stage.
        learning_rate: of both, the highest of its schedule.
        batch_size: of both.
        beta: weight of the attention map of each group of layers; its last norm's output is the map.
        loss: of ``(model, pixels, labels)``; cross-entropy if not given.
        seed: of the order of the images.

    Raises:
        InputError: if the network has no channels that can be removed, or a number is out of range.
    """
    check_range("group_channel_prune", "parameters", parameters, 0, 1, open_low=True, open_high=True)
    task = loss or _cross_entropy
    few = images.take(min(256, len(images)))
    teacher = deepcopy(model)
    groups = channel_groups(teacher, few.pixels[:2])
    division = divide(teacher, groups, parts=parts)
    fit = partial(train, images=images, learning_rate=learning_rate, batch_size=batch_size)
    with sparse_scales(teacher, groups, rate) as on_step:
        fit(teacher, epochs=sparse_epochs, on_step=on_step, loss=task, seed=seed)

    def measured(pruned: nn.Module) -> float:
        return float(task(pruned, few.pixels, few.labels))

    choose = by_measured_loss(teacher, groups, division, parameters=parameters, loss=measured)
    kept = at_parameters(teacher, groups, choose, parameters=parameters)
    student = shrink_channels(teacher, groups, kept)
    layers = dict.fromkeys(last_norms(teacher, groups, division), beta)
    with attention_loss(student, teacher, layers, task) as distilling:
        fit(student, epochs=distil_epochs, loss=distilling, seed=seed + 1)
    removed = {
        label: 1 - sum(int(kept[name].sum()) for name in names) / sum(len(kept[name]) for name in names)
        for label, names in division.items()
    }
    share = sum(p.numel() for p in student.parameters()) / sum(p.numel() for p in teacher.parameters())
    return GroupPruned(student, teacher, removed, share)


def divide(model: nn.Module, groups: Sequence[ChannelGroup], *, parts: Collection[str] = ()) -> dict[str, list[str]]:
    """Free groups with scales by the part of the network and the size of their maps: ``"backbone 14x14": [names]``.

    Args:
        model: has the groups.
        groups: from `channel_groups`.
        parts: paths of modules that are parts with similar structure, such as ``backbone`` and ``neck``.

    Raises:
        InputError: if no group has scales, or a part holds none of those that have.
    """
    scaled, found, used = scales_of(model, groups), dict[str, list[str]](), set[str]()
    if not scaled:
        raise fail("divide", "groups", "have norms with scales", "none")
    for group in groups:
        if group.name in scaled:
            part = next((part for part in parts if f"{group.name}.".startswith(f"{part}.")), "")
            used.add(part)
            label = " ".join(filter(None, (part, "x".join(map(str, group.scale))))) or "others"
            found.setdefault(label, []).append(group.name)
    for part in parts:
        if part not in used:
            raise fail("divide", "parts", "each hold channels that can be removed", part)
    return found


def group_thresholds(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    division: Division,
    sparsities: Mapping[str, float],
    *,
    least: float = 0.01,
) -> dict[str, Tensor]:
    """What stays at a threshold for each group of layers: the channels with the highest scales.

    Args:
        model: with scales trained sparse.
        groups: from `channel_groups`.
        division: from `divide`, or any other; of one group of layers only it is a global threshold.
        sparsities: fraction of the channels removed, by the names of ``division``.
        least: share of the channels of each channel group that stay whatever their scales, one at least.

    Returns:
        Kept channels for `shrink_channels`.

    Raises:
        InputError: if the names differ or a number is out of range.
    """
    check_sparsity("group_thresholds", least, "least")
    if set(division) != set(sparsities):
        raise fail("group_thresholds", "sparsities", f"be given for {', '.join(division)}", ", ".join(sparsities))
    scores = scale_scores(model, groups)
    kept: dict[str, Tensor] = {}
    for label, names in division.items():
        for name in names:
            if name not in scores:
                raise fail("group_thresholds", "division", f"hold names of {', '.join(scores)}", name)
        kept |= global_topk_masks({name: scores[name] for name in names}, sparsity=sparsities[label])
    for name, mask in kept.items():
        floor = max(1, num_kept(len(mask), 1 - least) if least else 1)
        if int(mask.sum()) < floor:
            kept[name] = topk_mask(scores[name], k=floor)
    return kept


def group_sparsities(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    division: Division,
    *,
    sparsity: float,
    loss: Callable[[nn.Module], float],
    step: float = 0.1,
) -> dict[str, float]:
    """Fractions for `group_thresholds`, by measured loss: `budget.greedy` over the groups of layers.

    Args:
        model: with scales trained sparse; scales and shifts are set to zero in turn, and are as before afterwards.
        groups: from `channel_groups`.
        division: from `divide`.
        sparsity: over all, each group of layers weighted by the weights of its filters.
        loss: of the model with channels at zero; lower is better.
        step: of `budget.greedy`.

    Returns:
        Name of a group of layers to the fraction of its channels to remove.

    Raises:
        InputError: as `group_thresholds`, or ``loss`` returns NaN.
    """
    members = {group.name: group.members for group in groups}
    shapes = {
        label: (sum(model.get_parameter(m.name).numel() for n in names for m in members[n] if m.role == "out"),)
        for label, names in division.items()
    }
    dense = {name: value.detach().clone() for name, value in model.named_parameters() if value.ndim == 1}
    thin = [replace(group, members=tuple(m for m in group.members if m.name in dense)) for group in groups]

    @torch.no_grad()
    def measured(trial: dict[str, float]) -> float:
        sparsities = dict.fromkeys(division, 0.0) | trial
        kept = group_thresholds(model, groups, division, sparsities)
        try:
            if any(not bool(mask.all()) for mask in kept.values()):
                channel_masks(model, thin, kept).apply_(model)
            with evaluating(model):
                return float(loss(model))
        finally:
            for name, value in dense.items():
                model.get_parameter(name).copy_(value)

    return budget.greedy(shapes, sparsity=sparsity, loss=measured, step=step, ceiling=max(0.97, sparsity))


def by_measured_loss(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    division: Division,
    *,
    parameters: float,
    loss: Callable[[nn.Module], float],
) -> Callable[[float], dict[str, Tensor]]:
    """Choices for `at_parameters`: the fractions of `group_sparsities`, which rise together with the amount.

    Removing a fraction s of all channels leaves about ``(1 - s)^2`` of the parameters: they are searched there.
    """
    found = group_sparsities(model, groups, division, sparsity=1 - parameters**0.5, loss=loss)

    def choose(amount: float) -> dict[str, Tensor]:
        more = {label: 1 - (1 - fraction) ** (amount / (1 - amount)) for label, fraction in found.items()}
        return group_thresholds(model, groups, division, more)

    return choose


def at_parameters(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    choose: Callable[[float], Mapping[str, Tensor]],
    *,
    parameters: float,
    rounds: int = 10,
) -> dict[str, Tensor]:
    """The choice by bisection that leaves a share of the model's parameters as near to ``parameters`` as it gets.

    Args:
        model: dense.
        groups: from `channel_groups`.
        choose: sparsity in [0, 1) to kept channels, fewer for a higher one.
        parameters: share to be left, in (0, 1).
        rounds: of the bisection.
    """
    check_range("at_parameters", "parameters", parameters, 0, 1, open_low=True, open_high=True)
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    low, high = 0.0, 0.99
    best: tuple[float, dict[str, Tensor]] | None = None
    for _ in range(rounds):
        middle = (low + high) / 2
        kept = dict(choose(middle))
        smaller = {name: value.numel() for name, value in shrunk_tensors(model, groups, kept).items() if name in sizes}
        share = sum((sizes | smaller).values()) / sum(sizes.values())
        if best is None or abs(share - parameters) < best[0]:
            best = abs(share - parameters), kept
        low, high = (middle, high) if share > parameters else (low, middle)
    assert best is not None
    return best[1]


def last_norms(model: nn.Module, groups: Sequence[ChannelGroup], division: Division) -> list[str]:
    """Path of the last norm of each group of layers that has maps: those are distilled by default."""
    scaled, flat, last = scales_of(model, groups), {g.name for g in groups if len(g.scale) != 2}, list[str]()
    for names in division.values():
        paths = [path.removesuffix(".weight") for name in names if name not in flat for path in scaled[name]]
        last += [path for path in paths if not isinstance(model.get_submodule(path), nn.BatchNorm1d)][-1:]
    return list(dict.fromkeys(last))


def _cross_entropy(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(pixels), labels)
