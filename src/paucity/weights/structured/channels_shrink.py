"""Channels of a network removed: as zeros in place, or for good into a smaller ordinary module.

Both compute the same, up to the order of sums: a removed channel is zero where it is made (filter, bias, scale and
shift of its norm) and in the columns that read it, so that also what an activation makes of zero reaches nobody.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...checks import check_bool, check_shape, did_you_mean, fail
from ...models.resize import replace_tensors
from ...ops.formats import Masks


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of a parameter or buffer whose entries belong to the units of a group.

    Attributes:
        name: of the parameter or buffer.
        dim: the dimension.
        role: ``out`` where it makes the channels, ``in`` where it reads them, ``scale`` for one value a channel.
        units: ``[size]`` int64, the unit of each entry; -1 for one of another group.
    """

    name: str
    dim: int
    role: str
    units: Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of several layers that can only be removed together, unit by unit.

    Attributes:
        name: module that makes them first in the forward, ``#2`` and so on after it where it has several groups; where
            none makes them, the parameter and the dimension (``conv.weight[1]`` reads the image).
        size: how many units there are; a unit is one channel of every layer, or several where they hang together.
        members: where the units are.
        scale: height and width (or length) of the maps of that module, empty where it makes none.
        reason: why no unit can be removed; empty where they can.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    scale: tuple[int, ...] = ()
    reason: str = ""

    @property
    def locked(self) -> bool:
        """Whether all units stay."""
        return bool(self.reason)


Kept = Mapping[str, Tensor]
"""Name of a group to bool ``[size]``, True is kept; a group that is not named stays whole."""


def check_kept(function: str, groups: Sequence[ChannelGroup], kept: Kept) -> None:
    """Raise InputError for an unknown or locked group, a wrong shape, or a group left without any unit."""
    known = {group.name: group for group in groups}
    for name, mask in kept.items():
        if name not in known:
            raise fail(function, "kept", "name groups of the model", f"{name}{did_you_mean(name, known)}")
        check_bool(function, f"kept[{name!r}]", mask)
        check_shape(function, f"kept[{name!r}]", mask, known[name].size)
        if not bool(mask.any()):
            raise fail(function, f"kept[{name!r}]", "keep at least one unit", "none")
        if known[name].locked and not bool(mask.all()):
            raise fail(function, "kept", "keep all of a locked group", f"less of {name} ({known[name].reason})")


def channel_masks(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Kept, *, nominal: float | None = None
) -> Masks:
    """Masks of the parameters that hold removed channels: rows that make them, one value each, columns that read them.

    Args:
        model: has the parameters.
        groups: from `channel_groups`.
        kept: see `Kept`.
        nominal: the sparsity asked for.

    Raises:
        InputError: see `check_kept`; or nothing is removed.
    """
    check_kept("channel_masks", groups, kept)
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    for name, dims in kept_entries(groups, kept).items():
        if name not in parameters:
            continue
        parameter = parameters[name]
        mask = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
        for dim, stays in dims.items():
            shape = [-1 if place == dim else 1 for place in range(parameter.ndim)]
            mask &= stays.to(parameter.device).view(shape)
        masks[name] = mask
    if not masks:
        raise fail("channel_masks", "kept", "remove at least one unit", "none removed")
    return Masks(masks, nominal=nominal)


def shrink_channels(model: nn.Module, groups: Sequence[ChannelGroup], kept: Kept) -> nn.Module:
    """A copy of ``model`` without the removed channels: an ordinary module of the same classes, with smaller layers.

    ``in_channels``, ``out_channels``, ``groups``, ``num_features`` and their like are those of the smaller layers. Its
    ``state_dict`` loads into the dense module through `paucity.models.resize.fit_to`.

    Raises:
        InputError: see `check_kept`, or the model has other shapes than the groups.
    """
    smaller = deepcopy(model)
    replace_tensors(smaller, shrunk_tensors(model, groups, kept))
    return smaller


def shrunk_tensors(model: nn.Module, groups: Sequence[ChannelGroup], kept: Kept) -> dict[str, Tensor]:
    """What is left of every parameter and buffer that holds removed channels, by name; the model is left as it is.

    Raises:
        InputError: as `shrink_channels`.
    """
    check_kept("shrink_channels", groups, kept)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    result = {}
    for name, dims in kept_entries(groups, kept).items():
        for dim, stays in dims.items():
            if name not in tensors or tensors[name].shape[dim] != len(stays):
                raise fail("shrink_channels", "groups", "be those of this model", f"{name} of another shape")
        result[name] = _selected(tensors[name], dims)
    return result


def kept_entries(groups: Sequence[ChannelGroup], kept: Kept) -> dict[str, dict[int, Tensor]]:
    """Tensor name to dimension to the entries that stay (bool), of the tensors that lose some."""
    found: dict[str, dict[int, Tensor]] = {}
    for group in groups:
        mask = kept.get(group.name)
        if mask is None or bool(mask.all()):
            continue
        for member in group.members:
            stays = torch.where(member.units < 0, True, mask.cpu()[member.units.clamp_min(0)])
            dims = found.setdefault(member.name, {})
            dims[member.dim] = dims[member.dim] & stays if member.dim in dims else stays
    return found


def _selected(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    result = tensor.detach()
    for dim, stays in dims.items():
        result = result.index_select(dim, stays.nonzero().squeeze(-1).to(result.device))
    return result.clone()
