"""Structure zeroed in place instead of removed, and the way from zeros to a smaller model."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from ...checks import InputError, fail
from ...ops.formats import Masks
from .blocks import check_layers, check_passes_through, layer_masks
from .layouts import find_units
from .shrinking import Kept, Shrunk, check_kept, shrink, whole_rows
from .units import Units, kept_entries, masks_of


def zero_masks(model: nn.Module, kept: Kept = (), *, layers: Collection[int] = ()) -> Masks:
    """Masks that set the entries of the units that go to 0: rows, columns and biases; layers lose their projections.

    Raises:
        InputError: as `shrink`; also for whole experts, which a router chooses also when they are zero.
    """
    check_kept("zero_masks", kept)
    masks: dict[str, Tensor] = {}
    if layers:
        masks |= layer_masks(model, check_layers("zero_masks", model, layers))
    for units, mask in kept:
        if units.kind == "experts":
            raise fail(
                "zero_masks", "kept", "be removed by shrink, as a router chooses zeroed experts, too", units.kind
            )
        chosen = masks_of(units, mask.cpu())
        for slot in units.slots:
            parameter = model.get_parameter(slot.parameter)
            index = kept_entries(slot, parameter.shape[slot.dim], units.sizes, chosen).to(parameter.device)
            keep = torch.zeros_like(parameter, dtype=torch.bool)
            if index.ndim == 1:
                keep.index_fill_(slot.dim, index, True)
            else:
                for part, rows in zip(keep, index, strict=True):
                    part.index_fill_(slot.dim - 1, rows, True)
            masks[slot.parameter] = masks[slot.parameter] & keep if slot.parameter in masks else keep
    return Masks(masks)


class Zeroed:
    """Structure that is zero in a model.

    Attributes:
        masks: what is kept.
        density: kept share of every parameter that was touched.
    """

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        self.model, self.masks = model, masks
        self._dense = {name: model.get_parameter(name).detach().clone() for name in masks}
        masks.apply_(model)
        self.density = {name: float(mask.float().mean()) for name, mask in masks.items()}

    @torch.no_grad()
    def remove(self) -> None:
        """Write the dense weights back, exactly."""
        for name, weight in self._dense.items():
            self.model.get_parameter(name).copy_(weight)
        self._dense = {}


def zero(model: nn.Module, kept: Kept = (), *, layers: Collection[int] = ()) -> Zeroed:
    """Zero units and layers in place; the logits are those that `shrink` gives.

    Raises:
        InputError: as `zero_masks`, and for layers that are no plain residual blocks. Then the model is as it was.
    """
    zeroed = Zeroed(model, zero_masks(model, kept, layers=layers))
    if layers:
        try:
            check_passes_through(model, check_layers("zero", model, layers))
        except BaseException:
            zeroed.remove()
            raise
    return zeroed


def trim(model: nn.Module) -> Shrunk:
    """Remove every head and neuron that is zero, in place: a folder of zeros becomes a small model again.

    What counts as zero is that its columns of the output projection are. Heads go where every layer can spare as many.
    Layers and experts are left.
    """
    kept = [pair for kind in ("heads", "neurons", "expert_neurons") for pair in _nonzero(model, kind)]
    return shrink(model, [(units, mask) for units, mask in kept if not bool(mask.all())])


def _nonzero(model: nn.Module, kind: str) -> Iterator[tuple[Units, Tensor]]:
    try:
        found = find_units(model, kind)
    except InputError:
        return
    masks = [alive(model, units) for units in found]
    if kind == "heads":
        groups = max(1, *(int(mask.any(1).sum()) for mask in masks))
        each = max(1, *(int(mask.sum(1).max()) for mask in masks))
        masks = [_fill_heads(mask, groups, each) for mask in masks]
    elif kind == "neurons":
        masks = [_fill(mask, max(1, int(mask.sum()))) for mask in masks]
    else:
        counts = [max(1, int(mask.sum(1).max())) for mask in masks]
        steps = [whole_rows(model, units) for units in found]
        counts = [-(-count // step) * step for count, step in zip(counts, steps, strict=True)]
        masks = [torch.stack([_fill(row, n) for row in mask]) for mask, n in zip(masks, counts, strict=True)]
    yield from zip(found, masks, strict=True)


def alive(model: nn.Module, units: Units) -> Tensor:
    """Bool of the shape ``units.sizes``: units with something other than 0 in the projection that they end in."""
    slot = units.output
    weight = model.get_parameter(slot.parameter).detach()
    (_, entries), *_ = slot.sets
    index = entries(units.sizes).to(weight.device)
    if units.kind == "expert_neurons":
        return (weight != 0).any(1).cpu()
    other = [dim for dim in range(weight.ndim) if dim != slot.dim]
    return (weight != 0).sum(other)[index].sum(-1).bool().view(units.sizes).cpu()


def _fill(mask: Tensor, count: int) -> Tensor:
    """``count`` units kept: those of the mask, and the first of the others where there are fewer."""
    order = mask.int().sort(descending=True, stable=True).indices
    return torch.zeros_like(mask).index_fill_(0, order[:count], True)


def _fill_heads(mask: Tensor, groups: int, each: int) -> Tensor:
    stay = _fill(mask.any(1), groups)
    return torch.stack(
        [_fill(row, each) if bool(keep) else torch.zeros_like(row) for row, keep in zip(mask, stay, strict=True)]
    )
