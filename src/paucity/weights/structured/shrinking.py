"""Removing structure from a model: physically, into an ordinary smaller one, or by zeros in its place.

What is kept computes as before, so that the smaller model gives the logits of the zeroed one. Removed are attention
heads (a group of queries with its keys and values, or equally many queries of every group that stays), neurons of
feed-forward networks and of experts, experts with their rows of the router, and whole layers.

The model stays an object of its class, with ``config`` changed to what it is now: caches, generation, padding and
``save_pretrained`` work on, and what is saved loads with plain transformers. Where the configuration cannot say the
sizes (per layer, or heads of GPT-2, GPT-NeoX and OPT, which must fill the hidden size), the model computes with the
small ones all the same, and its state dict is filled up with zeros; `trim` cuts such a model again after loading.
Nothing more can be removed from it while its state dict is filled up.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...checks import check_bool, check_shape, fail
from ...models.text_config import text_config
from .blocks import check_layers, cut_layers
from .layouts import find_units
from .sizes import (
    agrees,
    apply_values,
    expressible_heads,
    full_size,
    need_config,
    padded_shapes,
    place_in,
    says,
    shapes,
    slot_size,
)
from .surgery import Surgery, check_unfilled
from .trying import check_outputs, outputs_of_zeros
from .units import Sizes, Units, kept_entries, masks_of

Kept = Sequence[tuple[Units, Tensor]]
"""What stays: units, and bool of the shape ``units.sizes``."""


class Shrunk:
    """A model from which structure was removed.

    Attributes:
        density: kept share of every parameter that was touched, by its name in the dense model.
        values: what the configuration says now, where that changed.
        padded: whether the state dict is filled up with zeros, as the configuration cannot say the sizes.
    """

    def __init__(
        self, undo: Callable[[], object], density: Mapping[str, float], values: Mapping[str, object], padded: bool
    ) -> None:
        self._undo, self.density, self.values, self.padded = undo, dict(density), dict(values), padded

    def remove(self) -> None:
        """The dense model, exactly: the very parameters that were there."""
        self._undo()


def shrink(model: nn.Module, kept: Kept = (), *, layers: Collection[int] = ()) -> Shrunk:
    """Remove units and layers physically, in place.

    Args:
        model: of transformers.
        kept: from `find_units`, with bool masks (True stays). Of heads every layer keeps the same number of groups, and
            of heads in each of them; of the neurons of experts every expert of a layer keeps the same number.
        layers: indices of whole layers to remove.

    Raises:
        InputError: if nothing would be left, numbers differ where they must not, a weight is tied or of an unknown
            layout, the model computes something else without the units than with zeros, transformers could not build
            it again, or its state dict is filled up already. Then the model is as it was.
    """
    owner, dense = need_config("shrink", model), shapes(model)
    check_unfilled("shrink", owner)
    check_kept("shrink", kept)
    gone = tuple(f"{path}." for path in check_layers("shrink", model, layers)) if layers else ()
    tried = [pair for pair in kept if pair[0].kind in ("heads", "neurons")]
    expected = outputs_of_zeros(owner, tried)
    surgery = Surgery(owner)
    try:
        targets, values = _targets(owner, kept)
        density: dict[str, float] = {}
        for units, mask in tried:
            density |= _cut(surgery, units, mask.cpu(), targets[units.module])
        apply_values(surgery, owner, values)
        if expected:
            check_outputs(owner, expected)
        for units, mask in kept:
            if units.kind not in ("heads", "neurons"):
                density |= _cut(surgery, units, mask.cpu(), targets[units.module])
        if layers:
            values |= cut_layers(surgery, owner, layers)
            density |= {name: 0.0 for name in dense if name.startswith(gone)}
        agrees("shrink", surgery, values, in_blocks=bool(layers))
        apply_values(surgery, owner, values)
    except BaseException:
        surgery.undo()
        raise
    ordered = {name: density[name] for name in dense if name in density}
    return Shrunk(surgery.undo, ordered, values, bool(surgery.filled))


def check_kept(function: str, kept: Kept) -> None:
    """Shapes of masks, something left everywhere, and equal numbers where one number must do."""
    heads = set()
    for units, mask in kept:
        check_bool(function, f"mask of {units.module}", mask)
        check_shape(function, f"mask of {units.module}", mask, *units.sizes)
        if units.kind == "heads":
            counts = mask.sum(1)
            if not bool(counts.any()):
                raise fail(function, f"heads of {units.module}", "leave at least one", "none")
            if len(set(counts[counts > 0].tolist())) > 1:
                constraint = "leave equally many queries in every group that stays"
                raise fail(function, f"heads of {units.module}", constraint, counts.tolist())
            heads.add((int((counts > 0).sum()), int(counts.max())))
        elif units.kind == "expert_neurons":
            if len(set(mask.sum(1).tolist())) > 1 or not bool(mask.any()):
                got = mask.sum(1).tolist()
                raise fail(
                    function, f"neurons of {units.module}", "leave equally many in every expert, at least one", got
                )
        elif not bool(mask.any()):
            raise fail(function, f"{units.kind} of {units.module}", "leave at least one", "none")
    if len(heads) > 1:
        counted = ", ".join(f"{groups} groups of {each}" for groups, each in sorted(heads))
        raise fail(function, "heads", "leave the same number in every layer", counted)


def _targets(model: PreTrainedModel, kept: Kept) -> tuple[dict[str, Sizes], dict[str, object]]:
    """Sizes that the state dict shall have by module, and the values of the configuration that say so."""
    targets: dict[str, Sizes] = {}
    values: dict[str, object] = {}
    heads = [pair for pair in kept if pair[0].kind == "heads"]
    if heads:
        counts = heads[0][1].sum(1)
        every = find_units(model, "heads")
        if {units.module for units in every} == {units.module for units, _ in heads}:
            size, values = expressible_heads(model, every, (int((counts > 0).sum()), int(counts.max())))
        else:
            size = heads[0][0].sizes
        targets |= {units.module: size for units, _ in heads}
    for kind in ("neurons", "expert_neurons", "experts"):
        masks = {units.module: mask for units, mask in kept if units.kind == kind}
        if not masks:
            continue
        every, largest = find_units(model, kind), dict[str, int]()
        for units in every:
            mask = masks.get(units.module)
            count = units.sizes[-1] if mask is None else int(mask.sum(-1).max())
            largest[units.config] = max(count, largest.get(units.config, 0))
        sizes = [(*units.sizes[:-1], largest[units.config]) for units in every]
        if kind != "experts" and not says(model, largest, padded_shapes(model, every, sizes)):
            largest, sizes = {}, [units.sizes for units in every]
        targets |= {units.module: size for units, size in zip(every, sizes, strict=True)}
        values |= largest
    if any(units.kind == "experts" for units, _ in kept):
        _check_experts(model, kept)
    return targets, values


def _check_experts(model: PreTrainedModel, kept: Kept) -> None:
    """A token is routed to so many experts in every layer, and a router would choose one that is only filled up."""
    counts = [int(mask.sum()) for units, mask in kept if units.kind == "experts"]
    if len(set(counts)) > 1 or len(counts) < len(find_units(model, "experts")):
        raise fail("shrink", "experts", "leave the same number in every layer that has some", counts)
    need = getattr(text_config(model), "num_experts_per_tok", 1)
    if counts[0] < need:
        raise fail("shrink", "experts", f"leave the {need} that every token is routed to", counts[0])


def whole_rows(model: nn.Module, units: Units) -> int:
    """What the number of an expert's neurons must be a multiple of; 1 for all other units."""
    size = model.get_parameter(units.output.parameter).element_size()
    return max(1, 16 // size) if units.kind == "expert_neurons" else 1


def _cut(surgery: Surgery, units: Units, mask: Tensor, target: Sizes) -> dict[str, float]:
    """Cut one set of units; returns the kept share of each parameter."""
    model, density = surgery.model, dict[str, float]()
    masks = masks_of(units, mask)
    step = whole_rows(model, units)
    if int(mask.sum(-1).max()) % step:
        constraint = f"leave multiples of {step}, as the product over experts needs whole 16 bytes"
        raise fail("shrink", f"neurons of {units.module}", constraint, int(mask.sum(-1).max()))
    for slot in units.slots:
        size = slot_size(model, slot)
        index = kept_entries(slot, size, units.sizes, masks)
        full = full_size(units, size, slot, target)
        place = place_in(units, slot, full, target, mask) if full != index.shape[-1] else None
        surgery.cut(slot.module, slot.name, slot.dim, index, place, full)
        density[slot.parameter] = density.get(slot.parameter, 1.0) * index.shape[-1] / size
    groups, each = (int(mask.any(1).sum()), int(mask.sum(1).max())) if units.kind == "heads" else (0, 0)
    counts = {"groups": groups, "per_group": each, "heads": groups * each, "width": groups * each * units.head_dim}
    counts |= {"neurons": int(mask.sum(-1).max()), "experts": int(mask.sum())}
    for what, places in units.attributes.items():
        for path, name in places:
            surgery.set(model.get_submodule(path), name, counts[what])
    return density
