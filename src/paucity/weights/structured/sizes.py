"""What a configuration of transformers can say about sizes, found out by building its model without memory.

A configuration has one number of heads, of neurons and of experts for all layers. transformers 5 also records
``per_layer_config``, but the models that it ships do not build their layers from it, and reading a number that differs
between layers raises there. So sizes that differ are filled up to the largest of them.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from ...checks import fail
from ...models.text_config import text_config
from .surgery import Surgery
from .units import Sizes, Slot, Units, kept_entries, masks_of

_PLAIN = (int, float, str, bool, type(None))
_SIZES = ("in_features", "out_features", "nf", "nx", "num_heads", "split_size", "intermediate_size", "name_or_path")
"""Attributes that may differ from the configuration's where a state dict is filled up."""


def need_config(function: str, model: nn.Module) -> PreTrainedModel:
    """``model``, if it is one of transformers, whose configuration says the sizes."""
    if not isinstance(model, PreTrainedModel):
        raise fail(
            function, "model", "be a transformers model, whose configuration says its sizes", type(model).__name__
        )
    return model


def skeleton(model: PreTrainedModel, values: Mapping[str, object]) -> PreTrainedModel | None:
    """A model without memory from the configuration changed by ``values``; None if there can be no such model."""
    config = copy.deepcopy(model.config)
    try:
        for name, value in values.items():
            setattr(config.get_text_config(), name, value)
        config = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            built: PreTrainedModel = type(model)(config)
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError, StrictDataclassError):
        return None
    return built


def says(model: PreTrainedModel, values: Mapping[str, object], wanted: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the configuration changed by ``values`` makes a model of exactly the parameters ``wanted``."""
    built = skeleton(model, values)
    return built is not None and shapes(built) == dict(wanted)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def plain_attributes(model: nn.Module) -> dict[str, object]:
    """Numbers and words that the modules of ``model`` hold."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and not name.startswith("_") and name not in ("training", "gradient_checkpointing")
    }


def padded_shapes(model: nn.Module, found: Sequence[Units], sizes: Sequence[Sizes]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters if the units had ``sizes``."""
    result = shapes(model)
    for units, wanted in zip(found, sizes, strict=True):
        for slot in units.slots:
            shape = list(result[slot.parameter])
            shape[slot.dim] = full_size(units, slot_size(model, slot), slot, wanted)
            result[slot.parameter] = tuple(shape)
    return result


def slot_size(model: nn.Module, slot: Slot) -> int:
    """Entries of the slot's dimension."""
    return model.get_parameter(slot.parameter).shape[slot.dim]


def full_size(units: Units, size: int, slot: Slot, sizes: Sizes) -> int:
    """Entries along a slot's dimension, ``size`` now, if its units had ``sizes``."""
    now = sum(entries(units.sizes).numel() for _, entries in slot.sets)
    then = sum(entries(sizes).numel() for _, entries in slot.sets)
    return size - now + then


def place_in(units: Units, slot: Slot, full: int, sizes: Sizes, kept: torch.Tensor) -> torch.Tensor:
    """Where the kept entries lie in a dimension of ``full`` entries with units of ``sizes``: they come first."""
    counts = (int(kept.any(1).sum()), int(kept.sum(1).max())) if units.kind == "heads" else (int(kept.sum(-1).max()),)
    first = torch.zeros(sizes if units.kind == "heads" else sizes[-1:], dtype=torch.bool)
    first[tuple(slice(count) for count in counts)] = True
    masks = masks_of(units, first) if units.kind == "heads" else {units.kind: first}
    return kept_entries(slot, full, sizes, masks)


def expressible_heads(model: PreTrainedModel, found: Sequence[Units], kept: Sizes) -> tuple[Sizes, dict[str, object]]:
    """The smallest sizes of at least ``kept`` (groups, heads in each) that the configuration can say, and how.

    Returns:
        (sizes, values of the configuration); the sizes as they are and no values where no smaller ones can be said.
    """
    groups, each = found[0].sizes
    config = text_config(model)
    candidates = [(g, r) for g in range(kept[0], groups + 1) for r in range(kept[1], each + 1)]
    for g, r in sorted(candidates, key=lambda pair: (pair[0] * pair[1], pair[0])):
        if (g, r) == (groups, each):
            break
        values: dict[str, object] = {"num_attention_heads": g * r, "head_dim": found[0].head_dim}
        if getattr(config, "num_key_value_heads", None) is not None:
            values["num_key_value_heads"] = g
        elif r != each:
            continue
        if says(model, values, padded_shapes(model, found, [(g, r)] * len(found))):
            return (g, r), values
    return (groups, each), {}


def agrees(function: str, surgery: Surgery, values: Mapping[str, object], *, in_blocks: bool) -> None:
    """Refuse unless a plain transformers model of the changed configuration has exactly the parameters of this one.

    Args:
        function: for the error.
        surgery: on the model, done but for its configuration.
        values: changes of the configuration.
        in_blocks: whether every number and word that the modules hold must agree, too, as layers have moved.
    """
    built = skeleton(surgery.model, values)
    said = ", ".join(f"{name}={value}" for name, value in values.items())
    constraint = f"have a configuration that can say {said or 'its sizes'}"
    if built is None or shapes(built) != surgery.saved_shapes():
        raise fail(function, "model", constraint, type(surgery.model).__name__)
    if in_blocks:
        there = plain_attributes(built)
        for name, value in plain_attributes(surgery.model).items():
            if name.rpartition(".")[2] not in _SIZES and there.get(name, value) != value:
                raise fail(function, "model", constraint, f"{type(surgery.model).__name__}, where {name} would change")


def apply_values(surgery: Surgery, model: nn.Module, values: Mapping[str, object]) -> None:
    """Write the values into the model's own configuration, which its modules share."""
    for name, value in values.items():
        surgery.set(text_config(model), name, value)
