"""Channel pruning of any network of convolutions: whole channels with all that depends on them, removed for good.

Paper: Fang et al. 2023 (DepGraph), https://arxiv.org/abs/2301.12900, for groups of channels that go together (found
here as `channels_groups` says) and scores put together over a group; Li et al. 2016, https://arxiv.org/abs/1608.08710,
for filter norms; the other scores are those of `channels_scores`. Not implemented: sparse training that pushes whole
groups to zero before (group channel pruning does that by the norms' scales, `paucity.weights.group_channel`).
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...checks import check_choice, check_int, check_sparsity, fail
from ...measure.tokens import device_of, evaluating
from ...models.calibration import Batch, as_batches
from ...models.load import Loaded
from ...models.norms import recalibrate_norms
from ...models.resize import replace_tensors
from ...ops import budget
from ...ops.formats import Masks
from ...ops.select import global_topk_masks, num_kept, topk_mask
from .channels_groups import channel_groups
from .channels_scores import Score, channel_scores
from .channels_shrink import ChannelGroup, channel_masks, kept_entries, shrunk_tensors
from .surgery import check_unfilled, fill_up

Allocation = Literal["uniform", "erk", "global"]
_ENOUGH = 64


class ChannelsOptions(BaseModel):
    """Options of ``channels``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: float = Field(default=0.5, ge=0, lt=1, description="fraction of the channels removed that can be")
    score: Score = Field(default="l2", description="what a channel is ranked by")
    allocation: Allocation = Field(
        default="uniform", description="each group alike, by its shape, or all in one ranking"
    )
    round_to: int = Field(default=1, ge=1, description="channels left in a group are a multiple of this, rounded up")
    ignore: tuple[str, ...] = Field(default=(), description="groups left whole, with * and ?")
    shrink: bool = Field(default=True, description="remove them from the layers; otherwise they are zeros")
    recalibrate: bool = Field(default=True, description="measure the statistics of batch norms anew, given 64 images")
    seed: int = Field(default=0, description="of the score random")


@dataclass(frozen=True)
class ChannelChoice:
    """Which channels stay.

    Attributes:
        groups: all groups, locked ones too.
        kept: group name to bool ``[size]``.
        notes: what the user should know.
    """

    groups: list[ChannelGroup]
    kept: dict[str, Tensor]
    notes: list[str]


def choose_channels(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    sparsity: float = 0.5,
    score: Score = "l2",
    allocation: Allocation = "uniform",
    round_to: int = 1,
    ignore: Collection[str] = (),
    seed: int = 0,
) -> ChannelChoice:
    """Choose the channels of ``model`` that stay; the model is left as it is.

    Args:
        model: any network of convolutions and linear layers.
        calibration: images ``[B, C, H, W]``, with labels (``(images, labels)``) for the score ``taylor``; two of the
            first batch are the example on which the groups are found.
        sparsity: fraction of the units of the groups that are removed; at least one unit of each group stays.
        score: see `channels_scores`.
        allocation: ``uniform`` removes the fraction of every group; ``erk`` shares it by the shapes of the layers that
            make the channels, ``budget.erk``, weighted by their weights; ``global`` ranks all units together.
        round_to: units left in a group are a multiple of it, rounded up, as far as there are.
        ignore: names of groups that stay whole, with ``*`` and ``?``.
        seed: of the score ``random``.

    Raises:
        InputError: if there is no batch, an argument is out of range, no group can lose channels, or the model does
            not run on the batch.
    """
    check_sparsity("choose_channels", sparsity)
    check_int("choose_channels", "round_to", round_to)
    check_choice("choose_channels", "score", score, _choices(Score))
    check_choice("choose_channels", "allocation", allocation, _choices(Allocation))
    batches = [_moved(batch, device_of(model)) for batch in as_batches("choose_channels", model, calibration)]
    if not batches:
        raise fail("choose_channels", "calibration", "hold at least one batch of images", "none")
    first = batches[0][0] if isinstance(batches[0], tuple) else batches[0]
    groups = channel_groups(model, first[:2])
    for pattern in ignore:
        if not any(fnmatch(group.name, pattern) for group in groups):
            names = ", ".join(group.name for group in groups if not group.locked) or "none"
            raise fail("choose_channels", "ignore", f"name groups of the model ({names})", pattern)
    groups = [
        replace(group, reason="it is to be ignored")
        if not group.locked and any(fnmatch(group.name, pattern) for pattern in ignore)
        else group
        for group in groups
    ]
    free = [group for group in groups if not group.locked]
    if not free:
        reasons = "; ".join(f"{group.name}: {group.reason}" for group in groups) or "no convolution or linear layer"
        raise fail("choose_channels", "model", "have channels that can be removed", reasons)
    notes = [f"{group.name} keeps its {group.size}: {group.reason}" for group in groups if group.locked]
    with evaluating(model):
        scores = channel_scores(model, groups, score, batches=batches, seed=seed, notes=notes)
    kept = _select(model, free, scores, sparsity, allocation)
    for group in free:
        least = max(1, int(kept[group.name].sum()))
        least = min(group.size, -(-least // round_to) * round_to)
        if least != int(kept[group.name].sum()):
            kept[group.name] = topk_mask(scores[group.name], k=least)
    return ChannelChoice(groups, kept, notes)


class AppliedChannels:
    """Channels removed from a model, until they are brought back.

    Args:
        model: the pruned model.
        masks: of the dense model's parameters; None where nothing was removed.
        undo: what brings the dense model back, called last to first.
        state: method, options, what was kept and notes.
    """

    def __init__(
        self, model: nn.Module, masks: Masks | None, undo: Sequence[Callable[[], None]], state: dict[str, Any]
    ) -> None:
        self.model, self.masks = model, masks
        self._undo, self._state = list(undo), state

    def remove(self) -> None:
        """The dense model again, exactly; what training changed since is lost."""
        while self._undo:
            self._undo.pop()()

    def density(self) -> dict[str, float]:
        """Share of each dense parameter that is left."""
        layers = self.masks.sparsity().layers if self.masks is not None else {}
        return {name: 1 - sparsity for name, sparsity in layers.items()}

    def reset(self) -> None:
        """Nothing to reset: the density of weights is static."""

    def state(self) -> dict[str, Any]:
        """``{"method", "options", "sparsity", "kept", "notes"}``; ``kept`` has the numbers left and there by group."""
        return self._state


def options_for(method: str) -> type[BaseModel]:
    """The options of ``channels``."""
    check_choice("options_for", "method", method, ("channels",))
    return ChannelsOptions


def apply_step(loaded: Loaded, method: str, options: BaseModel, calibration: Iterable[Any]) -> AppliedChannels:
    """Remove channels of ``loaded.model`` in place, for good or as zeros.

    The configuration of a transformers model goes on with the dense sizes: its state dict is filled up with zeros to
    them, so that what is saved loads with plain transformers.

    Raises:
        InputError: as `choose_channels`, or an earlier step fills up the state dict; then the model is as before.
    """
    check_choice("apply_step", "method", method, ("channels",))
    given = ChannelsOptions.model_validate(options.model_dump())
    model = loaded.model
    if given.shrink:
        check_unfilled("channels", model)
    batches = as_batches("apply_step", model, calibration)
    choice = choose_channels(model, batches, **given.model_dump(exclude={"shrink", "recalibrate"}))
    masks, undo = None, list[Callable[[], None]]()
    if all(bool(mask.all()) for mask in choice.kept.values()):
        choice.notes.append("Nothing was removed: every group keeps all of its channels at this sparsity and round_to.")
    else:
        masks = channel_masks(model, choice.groups, choice.kept, nominal=given.sparsity)
        undo.append(_shrunk(model, choice) if given.shrink else _zeroed(model, masks))
    if given.recalibrate and masks is not None:
        images = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
        if sum(map(len, images)) >= _ENOUGH:
            undo.append(recalibrate_norms(model, [batch.to(device_of(model)) for batch in images]))
        else:
            choice.notes.append(f"the statistics of norms stay: {_ENOUGH} images are needed to measure them anew")
    state = {
        "method": method,
        "options": given.model_dump(mode="json"),
        "sparsity": 0.0 if masks is None else masks.sparsity().achieved,
        "kept": {name: [int(mask.sum()), len(mask)] for name, mask in choice.kept.items()},
        "notes": choice.notes,
    }
    return AppliedChannels(model, masks, undo, state)


def _shrunk(model: nn.Module, choice: ChannelChoice) -> Callable[[], None]:
    smaller = shrunk_tensors(model, choice.groups, choice.kept)
    if not isinstance(model, PreTrainedModel):
        return replace_tensors(model, smaller)
    choice.notes.append(
        "The model's configuration goes on with the dense sizes: saved weights are filled up with zeros to them, and no"
        " further step can remove anything from this model."
    )
    empty = fill_up(model, kept_entries(choice.groups, choice.kept))
    dense = replace_tensors(model, smaller)

    def undo() -> None:
        dense()
        empty()

    return undo


@torch.no_grad()
def _zeroed(model: nn.Module, masks: Masks) -> Callable[[], None]:
    dense = {name: model.get_parameter(name).detach().clone() for name in masks}
    masks.apply_(model)

    @torch.no_grad()
    def undo() -> None:
        for name, weight in dense.items():
            model.get_parameter(name).copy_(weight)

    return undo


def _select(
    model: nn.Module, groups: list[ChannelGroup], scores: dict[str, Tensor], sparsity: float, allocation: Allocation
) -> dict[str, Tensor]:
    if allocation == "global":
        return global_topk_masks(scores, sparsity=sparsity)
    wanted = dict.fromkeys(scores, sparsity)
    if allocation == "erk":
        shapes = {}
        for group in groups:
            member = next((member for member in group.members if member.role == "out"), group.members[0])
            shapes[group.name] = tuple(model.get_parameter(member.name).shape)
        wanted = budget.erk(shapes, sparsity=sparsity)
    return {name: topk_mask(values, k=num_kept(len(values), wanted[name])) for name, values in scores.items()}


def _moved(batch: Batch, device: torch.device) -> Batch:
    return (batch[0].to(device), batch[1].to(device)) if isinstance(batch, tuple) else batch.to(device)


def _choices(literal: Any) -> tuple[str, ...]:
    found: tuple[str, ...] = literal.__args__
    return found
