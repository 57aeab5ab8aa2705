"""Masks in force while a model trains, and what averaging makes of them."""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...checks import check_choice, check_range, fail
from .mask_names import Located

if TYPE_CHECKING:
    from .masks import Masks

Keep = Literal["union", "intersection"]


def removed_here(mask: Tensor, parameter: Tensor) -> Tensor:
    """Where ``mask`` removes, on the parameter's device; of a sharded parameter (DTensor) the shard of this process."""
    gone = ~mask.to(parameter.device)
    if not _sharded(parameter):
        return gone
    from torch.distributed.tensor import distribute_tensor  # over a second to import, and there already

    shard: Any = parameter
    return distribute_tensor(gone, shard.device_mesh, shard.placements, src_data_rank=None).to_local()


def local(tensor: Tensor) -> Tensor:
    """``tensor``; of a sharded one the shard of this process, sharing its memory."""
    shard: Any = tensor
    mine: Tensor = shard.to_local() if _sharded(tensor) else tensor
    return mine


def total(count: Tensor, like: Tensor) -> int:
    """A count over the shard of this process, summed over the processes that share ``like``."""
    if _sharded(like):
        shard: Any = like
        for dim, placement in enumerate(shard.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(count, group=shard.device_mesh.get_group(dim))
    return int(count)


def _sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


@torch.no_grad()
def zero_removed(function: str, found: Sequence[tuple[Tensor, Located]]) -> None:
    """Set removed entries of the parameters to 0, in place; all or none.

    Raises:
        InputError: if a parametrization computes something else than 0 from a removed entry.
    """
    undo: list[tuple[Located, Tensor]] = []
    for mask, place in found:
        if not place.parametrized:
            continue
        undo.append((place, place.parameter.detach().clone()))
        local(place.parameter).masked_fill_(removed_here(mask, place.parameter), 0)
        if bool((local(place.weight()) != 0).logical_and_(removed_here(mask, place.weight())).any()):
            for changed, before in undo:
                changed.parameter.copy_(before)
            raise fail(function, place.name, "stay 0 under its parametrization", "one that fills removed entries")
    for mask, place in found:
        local(place.parameter).masked_fill_(removed_here(mask, place.parameter), 0)


def clearing(found: Sequence[tuple[Tensor, Located]]) -> Callable[..., None]:
    """A hook for ``Optimizer.step``: removed entries of parameters, and of state of their shape, become 0."""
    gone = [removed_here(mask, place.parameter) for mask, place in found]
    parameters = [place.parameter for _, place in found]

    @torch.no_grad()
    def clear(optimizer: Optimizer, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        for i, parameter in enumerate(parameters):
            if gone[i].device != parameter.device:  # the model has moved since
                gone[i] = gone[i].to(parameter.device)
            local(parameter).masked_fill_(gone[i], 0)
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                    local(value).masked_fill_(gone[i].to(value.device), 0)

    return clear


class Averaged(NamedTuple):
    """An average of models and its masks."""

    model: nn.Module
    masks: "Masks"


@torch.no_grad()
def average_models(
    models: Sequence[nn.Module],
    masks: Sequence["Masks"],
    *,
    keep: Keep = "union",
    shares: Sequence[float] | None = None,
) -> Averaged:
    """The average of masked models of one architecture, masked.

    With equal masks it is exactly as sparse as they are. With different ones, of sparsity s and independent, the union
    of what n models keep has sparsity s^n: the plain average, where a weight that only some keep shrinks. The
    intersection has 1 - (1 - s)^n: entries that all keep, so that every model loses some of its own.

    Args:
        models: at least one, with the same parameters and buffers; they are left as they are.
        masks: of each model, or one for all.
        keep: ``union``: what any model keeps; ``intersection``: what all keep.
        shares: weight of each model, non-negative, divided by their sum; equal ones if None.

    Returns:
        A copy of the first model with the averages, taken in float32 at least, and its masks; buffers that are not
        floating point are those of the first. ``nominal`` is that of the masks where they agree, else None.

    Raises:
        InputError: if the numbers of models, masks and shares differ, models or masks do not match, or a model does
            not obey its masks.
    """
    name = "average_models"
    check_choice(name, "keep", keep, ("union", "intersection"))
    if not models:
        raise fail(name, "models", "hold at least one model", "none")
    masks = list(masks) * len(models) if len(masks) == 1 else masks
    for argument, values in (("masks", masks), ("shares", shares)):
        if values is not None and len(values) != len(models):
            raise fail(name, argument, f"be one for each of {len(models)} models", len(values))
    shares = [1.0] * len(models) if shares is None else list(shares)
    for share in shares:
        check_range(name, "shares", share, 0.0, open_high=True)
    if not sum(shares) > 0:
        raise fail(name, "shares", "have a positive sum", sum(shares))
    states = [model.state_dict() for model in models]
    for state in states[1:]:
        if {key: value.shape for key, value in state.items()} != {key: v.shape for key, v in states[0].items()}:
            raise fail(name, "models", "have the same parameters and buffers", "a difference in names or shapes")
    merged = masks[0]
    for other in masks[1:]:
        merged = merged | other if keep == "union" else merged & other
    merged.nominal = masks[0].nominal if all(each == masks[0] for each in masks) else None
    for each, model in zip(masks, models, strict=True):
        if broken := each.violations(model):
            raise fail(
                name, "models", "obey their masks (apply_ them first)", f"{sum(broken.values())} entries that do not"
            )
    result = copy.deepcopy(models[0])
    for key, target in result.state_dict().items():
        if target.is_floating_point():
            wide = torch.promote_types(target.dtype, torch.float32)
            parts = zip(states, shares, strict=True)
            mean = sum((state[key].to(target.device, wide) * (share / sum(shares)) for state, share in parts), 0)
            target.copy_(torch.as_tensor(mean))
    merged.apply_(result)
    return Averaged(result, merged)
