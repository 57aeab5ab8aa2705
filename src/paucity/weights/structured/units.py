"""Units of structure: which entries of which weights belong to a head, a neuron or an expert.

A unit is what can be removed without a trace: an attention head (rows of the query projection, columns of the output
projection; the key and value rows of its group go when the whole group goes), a neuron of a feed-forward network (rows
of gate and up, a column of down), an expert (its matrices and its row of the router). `layouts.find_units` finds them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Sizes = tuple[int, ...]
Entries = Callable[[Sizes], Tensor]
"""``entries(sizes)`` is int64 ``[units, width]``: positions of every unit along one dimension of a weight."""


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter, shared out among units.

    Attributes:
        module: path of the owner.
        name: of the parameter in its owner.
        dim: of the parameter as stored.
        sets: name of a mask of units to the entries of each unit.
        output: whether the dimension is the input of the projection that the units end in (o, down).
    """

    module: str
    name: str
    dim: int
    sets: tuple[tuple[str, Entries], ...]
    output: bool = False

    @property
    def parameter(self) -> str:
        """Full name of the parameter."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Units:
    """All units of one sort in one module of a block.

    Attributes:
        kind: ``heads``, ``neurons``, ``expert_neurons`` or ``experts``.
        block: path of the block.
        layer: index of the block.
        module: path of the module whose units they are.
        sizes: (key-value heads, query heads in each) of heads, (neurons,), (experts, neurons in each), (experts,).
        slots: where they lie.
        attributes: (module, attribute) pairs that hold the number of units, by what they count.
        config: the configuration's name for each number in ``sizes`` that it knows.
        head_dim: entries of a head; 0 where there are none.
    """

    kind: str
    block: str
    layer: int
    module: str
    sizes: Sizes
    slots: tuple[Slot, ...]
    attributes: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    config: str = ""
    head_dim: int = 0

    @property
    def output(self) -> Slot:
        """The slot of the projection that the units end in."""
        return next(slot for slot in self.slots if slot.output)


def masks_of(units: Units, kept: Tensor) -> dict[str, Tensor]:
    """The masks that `Slot.sets` name, flat, from ``kept`` (bool, the shape ``units.sizes``)."""
    if units.kind == "heads":
        return {"query": kept.flatten(), "group": kept.any(1)}
    return {units.kind: kept.flatten() if units.kind == "experts" else kept}


def kept_entries(slot: Slot, size: int, sizes: Sizes, masks: Mapping[str, Tensor]) -> Tensor:
    """Positions in a dimension of ``size`` that stay, ascending: int64 ``[n]``; of expert neurons ``[experts, n]``."""
    (first, _), *_ = slot.sets
    if masks[first].ndim == 2:
        rows = [
            kept_entries(slot, size, sizes, {name: mask[expert] for name, mask in masks.items()})
            for expert in range(len(masks[first]))
        ]
        return torch.stack(rows)
    keep = torch.ones(size, dtype=torch.bool)
    for name, entries in slot.sets:
        keep[entries(sizes)[~masks[name].cpu()].flatten()] = False
    return keep.nonzero().squeeze(-1)
