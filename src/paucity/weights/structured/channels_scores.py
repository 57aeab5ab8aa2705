"""How much the channels of a dependency group matter: scores of layers, put together over the group.

Each layer scores its channels; a unit of a group gets the mean over its channels in a layer and over the layers. Layers
are brought to mean 1 over the group before, so that none of them rules by its scale, and groups can be compared. The
scores that mean the same in all layers are not: ``taylor``, of which a unit gets the sum, and ``bn``.

- ``l1``, ``l2``: norm of the filter that makes a channel. Paper: Li et al. 2016, https://arxiv.org/abs/1608.08710.
- ``bn``: ``|gamma|`` of its norm. Paper: Liu et al. 2017, https://arxiv.org/abs/1708.06519.
- ``taylor``: ``sum (w g)^2`` over the filter, g^2 the mean square of the loss's gradient. Paper: Molchanov et al. 2019,
  https://arxiv.org/abs/1906.10771, Eq. 8 (there of one gate a channel, here of its weights).
- ``wanda``: ``sum_o |W_oc| * ||x_c||`` over the weights that read a channel, as Wanda, https://arxiv.org/abs/2306.11695.
- ``random``: a control.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...checks import fail
from ...models.calibration import Batch
from ...models.hooks import input_norms
from ...models.sites import Site, find_sites
from ..gradients import squared_gradients
from .channels_shrink import ChannelGroup, Member

Score = Literal["l1", "l2", "bn", "taylor", "wanda", "random"]
OfMember = Callable[[Member], Tensor | None]


def channel_scores(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    score: Score,
    *,
    batches: Sequence[Batch] = (),
    seed: int = 0,
    notes: list[str] | None = None,
) -> dict[str, Tensor]:
    """Name of each free group to float32 ``[size]``; higher is kept.

    Args:
        model: has the groups; with ``wanda`` and ``taylor`` it should be in eval mode.
        groups: from `channel_groups`; locked ones are passed over.
        score: see the module. A group without a norm (``bn``) or without layers that read it (``wanda``) goes by
            ``l2``, brought to the mean of the others, and that is noted.
        batches: images for ``wanda``, ``(images, labels)`` for ``taylor``.
        seed: of ``random``.
        notes: gets what the user should know.

    Raises:
        InputError: if there are no batches where they are needed, or a score is not finite.
    """
    free = [group for group in groups if not group.locked]
    if score in ("wanda", "taylor") and not batches:
        raise fail("channel_scores", "batches", f"hold at least one batch for {score}", "none")
    if score == "random":
        generator = torch.Generator().manual_seed(seed)
        return {group.name: torch.rand(group.size, generator=generator) for group in free}
    of_member = _measured(model, free, score, batches)
    by_norm = _norms(model, "l2")
    found = {group.name: _together(group, of_member, score) for group in free}
    known = [values for values in found.values() if values is not None]
    level = torch.cat(known).mean() if known else torch.tensor(1.0)
    result: dict[str, Tensor] = {}
    for group in free:
        values = found[group.name]
        if values is None:
            values = _together(group, by_norm, "l2")
            values = torch.ones(group.size) if values is None else values * level
            if notes is not None:
                notes.append(f"{group.name}: nothing to score by {score}, so that it went by l2")
        if not bool(values.isfinite().all()):
            raise fail("channel_scores", "model", "have finite scores", f"NaN or infinity in {group.name}")
        result[group.name] = values
    return result


def _together(group: ChannelGroup, of_member: OfMember, score: str) -> Tensor | None:
    """What the layers of a group say of its units; None where no layer says anything."""
    rows = []
    for member in group.members:
        values = of_member(member)
        if values is None:
            continue
        mine = member.units >= 0
        unit = member.units[mine]
        total = torch.zeros(group.size).index_add_(0, unit, values[mine])
        mean = total / torch.bincount(unit, minlength=group.size)
        if score == "taylor":
            rows.append(total)
        else:
            rows.append(mean if score == "bn" else mean / mean.mean().clamp_min(torch.finfo(torch.float32).tiny))
    if not rows:
        return None
    return torch.stack(rows).sum(0) if score == "taylor" else torch.stack(rows).mean(0)


def _measured(model: nn.Module, groups: Sequence[ChannelGroup], score: str, batches: Sequence[Batch]) -> OfMember:
    if score == "bn":
        scales = {
            f"{path}.weight": module.weight
            for path, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm) and module.affine
        }
        return lambda member: scales[member.name].detach().float().abs().cpu() if member.name in scales else None
    if score == "wanda":
        return _wanda(model, groups, batches)
    if score == "taylor":
        names = {member.name for group in groups for member in group.members if member.role == "out"}
        sites = [Site(name, name.rpartition(".")[0], "conv", None) for name in sorted(names)]
        gradients: dict[str, Any] = squared_gradients(model, sites, list(batches))
        return _norms(model, "taylor", gradients)
    return _norms(model, score)


def _norms(model: nn.Module, score: str, gradients: dict[str, Tensor] | None = None) -> OfMember:
    parameters = dict(model.named_parameters())

    def of_member(member: Member) -> Tensor | None:
        if member.role != "out":
            return None
        weight = parameters[member.name].detach().float()
        rows = weight.movedim(member.dim, 0).flatten(1)
        if gradients is not None:
            return (rows.square() * gradients[member.name].movedim(member.dim, 0).flatten(1)).sum(1).cpu()
        norms: Tensor = torch.linalg.vector_norm(rows, ord=1 if score == "l1" else 2, dim=1).cpu()
        return norms

    return of_member


def _wanda(model: nn.Module, groups: Sequence[ChannelGroup], batches: Sequence[Batch]) -> OfMember:
    names = {member.name for group in groups for member in group.members if member.role == "in"}
    sites = [site for site in find_sites(model) if site.name in names and site.kind != "embedding"]
    images = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    norms = input_norms(model, sites, images) if sites else {}

    def of_member(member: Member) -> Tensor | None:
        if member.role != "in" or member.name not in norms:
            return None
        weight = model.get_parameter(member.name).detach().float()
        read = weight.abs().movedim(member.dim, 0).flatten(1).sum(1)
        # Of a convolution in groups the inputs at one place of every group share a column.
        norm = norms[member.name].float().view(-1, len(read)).square().sum(0).sqrt()
        return (read * norm).cpu()

    return of_member
