"""SparseByteNN: kernels of neighbouring output channels share what they keep, once the channels are in a fitting order.

Paper: Xu et al. 2023, https://arxiv.org/abs/2310.19509: a granularity between unstructured and structured, patterns by
operator, and a rearrangement of the whole network that leaves its function alone. Patterns here, for groups of g output
channels: a 1x1 or larger convolution keeps or drops whole kernels, the same input channels for the group; a depthwise
convolution keeps or drops places of the kernel, the same ones for the group. The paper's search for an order was not
found: here every set of channels that must move together is tried in the order it has, sorted by norm (the 1xN
pattern, https://arxiv.org/abs/2105.14713), and gathered by likeness; the one that keeps most of the magnitude stays.
Not implemented: the ARM and WebAssembly kernels; the pattern runs on the product of `sparse_conv`.
"""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..checks import InputTypeError, check_choice, check_divides, check_floating, check_int, check_sparsity, fail
from ..models.load import Loaded
from ..models.sites import Site, find_sites, weight_view
from ..ops.formats import Masks
from ..ops.select import block_topk_mask
from .magnitude import magnitude_score
from .structured.channels_groups import channel_groups
from .structured.channels_moves import tensors_in
from .structured.channels_shrink import ChannelGroup, Member

_ROUNDING = 1e-3
"""Share of the largest output by which a rearranged network may differ: sums run in another order."""


def kernel_group_mask(weight: Tensor, *, group_size: int, sparsity: float) -> Tensor:
    """Keep-mask (bool) of kernels, or of places in a depthwise kernel, the same for each group of output channels.

    Args:
        weight: ``[out, in, *kernel]``; with ``in`` 1 and a kernel of several places it is a depthwise one.
        group_size: g, neighbouring output channels that share a pattern; divides ``out``.
        sparsity: fraction of the groups' kernels (or places) removed, by the sum of their magnitudes.

    Returns:
        of the shape of ``weight``.

    Raises:
        InputError: if ``group_size`` does not divide ``out``, or ``sparsity`` is out of range.
    """
    check_floating("kernel_group_mask", "weight", weight)
    if weight.ndim < 2:
        raise fail("kernel_group_mask", "weight", "have at least 2 dimensions", f"shape {list(weight.shape)}")
    check_int("kernel_group_mask", "group_size", group_size)
    check_divides("kernel_group_mask", "group_size", group_size, weight.shape[0], "the output channels")
    score = _profiles(weight)
    kept = block_topk_mask(score, block=(group_size, 1), sparsity=sparsity)
    wide = kept.view(len(weight), -1, *([1] * (weight.ndim - 2))) if _by_kernel(weight) else kept.view(weight.shape)
    return wide.expand(weight.shape).contiguous()


def kernel_group_masks(
    model: nn.Module, *, group_size: int, sparsity: float, sites: Collection[str] = ("pointwise",)
) -> Masks:
    """The masks of all ``sites`` (see `paucity.models.sites`); ``model`` is left alone.

    Raises:
        InputError: as `kernel_group_mask`, or if the model has no such sites or one is no convolution or matrix.
    """
    check_sparsity("kernel_group_masks", sparsity)
    masks = {
        site.name: kernel_group_mask(weight_view(model, site), group_size=group_size, sparsity=sparsity)
        for site in find_sites(model, sites)
    }
    return Masks(masks, nominal=sparsity)


class KernelGroups(BaseModel):
    """Options of ``kernel_groups``: arguments of `kernel_group_masks`; ``reorder`` puts it behind `rearrange`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: float = Field(default=0.5, ge=0, lt=1)
    group_size: int = Field(default=4, ge=1, description="neighbouring output channels that share a pattern")
    sites: tuple[str, ...] = ("pointwise",)
    reorder: bool = True


class AppliedKernelGroups:
    """Kernel groups in force on a model.

    Args:
        model: pruned.
        masks: what was kept.
        dense: its state before.
        state: method, options and notes.
    """

    def __init__(self, model: nn.Module, masks: Masks, dense: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.model, self.masks, self._dense, self._state = model, masks, dense, state

    def remove(self) -> None:
        """Write everything back as it was, the order of the channels included."""
        self.model.load_state_dict(self._dense)

    def density(self) -> dict[str, float]:
        """Share of nonzeros that each pruned parameter has now."""
        return {name: 1 - sparsity for name, sparsity in self.masks.achieved_in(self.model).layers.items()}

    def reset(self) -> None:
        """Nothing to reset: the density of weights is static."""

    def state(self) -> dict[str, Any]:
        """``{"method", "options", "sparsity", "notes"}``."""
        return self._state


def options_for(method: str) -> type[BaseModel]:
    """The options of ``kernel_groups``."""
    check_choice("options_for", "method", method, ("kernel_groups",))
    return KernelGroups


def apply_step(loaded: Loaded, method: str, options: BaseModel, calibration: list[Tensor]) -> AppliedKernelGroups:
    """Rearrange and prune ``loaded.model`` in place; the first batch of the calibration checks that its function stays.

    Raises:
        InputError: as `rearrange`; or if there is no calibration to rearrange by.
    """
    check_choice("apply_step", "method", method, ("kernel_groups",))
    given = KernelGroups.model_validate(options.model_dump())
    model, notes = loaded.model, list[str]()
    dense = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if given.reorder:
        if not calibration:
            raise fail("kernel_groups", "calibration", "hold at least one batch to rearrange by", "none")
        sizes = {"group_size": given.group_size, "sparsity": given.sparsity, "sites": given.sites}
        found = rearrange(model, calibration[0][:8], **sizes)  # type: ignore[arg-type]
        notes.append(
            f"{len(found.orders)} sets of channels were rearranged: groups keep {found.kept_after:.1%} of the "
            f"magnitude instead of {found.kept_before:.1%}."
        )
    masks = kernel_group_masks(
        found.model if given.reorder else model, group_size=given.group_size, sparsity=given.sparsity, sites=given.sites
    )
    if given.reorder:
        model.load_state_dict(found.model.state_dict())
    masks.apply_(model)
    state = {"method": method, "options": given.model_dump(mode="json"), "sparsity": masks.sparsity().achieved}
    return AppliedKernelGroups(model, masks, dense, state | {"notes": notes})


@dataclass(frozen=True)
class Rearranged:
    """A network with its channels in another order.

    Attributes:
        model: a copy that computes what the given model does.
        orders: name of a group of channels to the unit that stands at each place now; only groups that moved.
        kept_before: share of the magnitude that kernel groups would have kept in the given order.
        kept_after: the same in the new order.
    """

    model: nn.Module
    orders: dict[str, Tensor]
    kept_before: float
    kept_after: float


@torch.no_grad()
def rearrange(
    model: nn.Module,
    example: Tensor,
    *,
    group_size: int,
    sparsity: float,
    sites: Collection[str] = ("pointwise",),
) -> Rearranged:
    """Permute the channels through the whole network so that like kernels become neighbours; the function stays.

    Args:
        model: any network whose channels can be followed; see `paucity.weights.structured.channels_groups`.
        example: input of its forward, not all zero.
        group_size: neighbouring output channels that are to share a pattern.
        sparsity: at which the kept magnitude is compared.
        sites: the convolutions to be pruned.

    Raises:
        InputError: if an argument is out of range, or the model has no such sites.
    """
    check_int("rearrange", "group_size", group_size)
    check_sparsity("rearrange", sparsity)
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"rearrange: model must be a Module, got {type(model).__name__}.")
    found = {site.name: site for site in find_sites(model, sites)}
    current, orders = deepcopy(model).eval(), dict[str, Tensor]()
    before = _kept(current, list(found.values()), group_size, sparsity)
    expected, groups = current(example), channel_groups(current, example)
    for group in groups:
        made = [found[member.name] for member in group.members if _makes(member, found)]
        if group.locked or not made or group.size % group_size:
            continue
        profiles = torch.cat([_unit_profiles(current, site, group) for site in made], dim=1)
        best = max(_orders(profiles, group_size), key=lambda order: _kept_sum(profiles[order], group_size, sparsity))
        if torch.equal(best, torch.arange(group.size)):
            continue
        moved = permute_channels(current, group, best)
        if _same(moved(example), expected):
            current, orders[group.name] = moved, best
    return Rearranged(current, orders, before, _kept(current, list(found.values()), group_size, sparsity))


@torch.no_grad()
def permute_channels(model: nn.Module, group: ChannelGroup, order: Tensor) -> nn.Module:
    """A copy of ``model`` in which unit ``order[i]`` of a group of channels stands where unit ``i`` stood.

    Raises:
        InputError: if ``order`` is no permutation of the units.
    """
    if order.dtype != torch.int64 or not torch.equal(order.sort().values, torch.arange(group.size)):
        raise fail("permute_channels", "order", f"hold 0 to {group.size - 1} once each", order.tolist())
    moved = deepcopy(model)
    tensors = dict([*moved.named_parameters(), *moved.named_buffers()])
    for member in group.members:
        tensor = tensors[member.name]
        places = _places(member.units, order).to(tensor.device)
        tensor.copy_(tensor.index_select(member.dim, places))
    return moved


def _same(out: Any, expected: Any) -> bool:
    """Whether two outputs of a network hold the same numbers, up to rounding."""
    pairs = [(a.double(), b.double()) for a, b in zip(tensors_in(out), tensors_in(expected), strict=True) if b.numel()]
    return all(bool((a - b).abs().max() <= _ROUNDING * b.abs().max()) for a, b in pairs)


def _places(units: Tensor, order: Tensor) -> Tensor:
    """Where each entry of a dimension comes from: the j-th entry of unit i gets the j-th entry of unit ``order[i]``."""
    places, owned = torch.arange(len(units)), [(units == unit).nonzero().squeeze(-1) for unit in range(len(order))]
    for unit, source in enumerate(order.tolist()):
        places[owned[unit]] = owned[source]
    return places


def _makes(member: Member, found: Mapping[str, Site]) -> bool:
    """Whether a group's units are rows of a site, one each."""
    return member.name in found and member.dim == 0 and torch.unique(member.units).numel() == len(member.units)


def _by_kernel(weight: Tensor) -> bool:
    return weight.shape[1] > 1 or weight[0, 0].numel() == 1


def _profiles(weight: Tensor) -> Tensor:
    """Scores ``[out, in]`` of kernels, or ``[out, places]`` of a depthwise convolution."""
    score = magnitude_score(weight)
    return score.flatten(2).sum(-1) if _by_kernel(weight) and weight.ndim > 2 else score.flatten(1)


def _unit_profiles(model: nn.Module, site: Site, group: ChannelGroup) -> Tensor:
    """Scores of a site's rows in the order of the group's units."""
    member = next(member for member in group.members if member.name == site.name and member.dim == 0)
    rows = _profiles(weight_view(model, site))
    return rows[member.units.argsort()] if len(rows) == group.size else rows


def _orders(profiles: Tensor, group_size: int) -> list[Tensor]:
    """The order there is, by norm, and gathered: the strongest channel left, then those most like it."""
    norm = profiles.sum(-1)
    gathered, left = list[int](), torch.ones(len(profiles), dtype=torch.bool)
    unit = torch.nn.functional.normalize(profiles.double(), dim=-1)
    for _ in range(len(profiles) // group_size):
        first = int(torch.where(left, norm, -1.0).argmax())
        like = torch.where(left, unit @ unit[first], -1.0)
        like[first] = 2.0
        chosen = like.topk(group_size).indices
        left[chosen] = False
        gathered += chosen.tolist()
    return [torch.arange(len(profiles)), norm.argsort(descending=True, stable=True), torch.tensor(gathered)]


def _kept_sum(profiles: Tensor, group_size: int, sparsity: float) -> float:
    return float(profiles[block_topk_mask(profiles, block=(group_size, 1), sparsity=sparsity)].sum())


def _kept(model: nn.Module, sites: Sequence[Site], group_size: int, sparsity: float) -> float:
    """Share of the magnitude of all sites that kernel groups keep."""
    kept = total = 0.0
    for site in sites:
        profiles = _profiles(weight_view(model, site))
        check_divides("rearrange", "group_size", group_size, len(profiles), f"the output channels of {site.name}")
        kept, total = kept + _kept_sum(profiles, group_size, sparsity), total + float(profiles.sum())
    return kept / total if total else 1.0
