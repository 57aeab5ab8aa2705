"""Models some of whose linear layers hold packed weights: putting them in place, and back."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.linear import PackedLinear


def packed_linears(model: nn.Module, *, everywhere: bool = False) -> dict[str, PackedLinear]:
    """The packed layers of ``model`` by path, each once, or ``everywhere`` it stands."""
    modules = model.named_modules(remove_duplicate=not everywhere)
    return {path: module for path, module in modules if isinstance(module, PackedLinear)}


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each of ``modules`` in the place of the one at its path, and wherever else that one stands.

    Hooks stay: those of the module that goes are those of the one that comes, and their handles remove them there.
    """
    by_id = {id(model.get_submodule(path)): module for path, module in modules.items()}
    places = [(path, by_id[id(old)]) for path, old in model.named_modules(remove_duplicate=False) if id(old) in by_id]
    for path, new in places:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        old = owner.get_submodule(name)
        for key, value in vars(old).items():
            if key.startswith(("_forward", "_backward", "_is_full")):
                new.__dict__[key] = value
        new.training = old.training
        setattr(owner, name, new)


def packed_in_place_of(linear: nn.Linear | Conv1D, packed: PackedLinear) -> PackedLinear:
    """``packed`` as the layer that stands for ``linear``: its bias is the same object."""
    packed.bias, packed.transposed = linear.bias, isinstance(linear, Conv1D)
    return packed


def dense_linear(packed: PackedLinear) -> nn.Module:
    """The ordinary layer that ``packed`` stands for: an ``nn.Linear`` or a ``Conv1D`` with the zeros in place."""
    with torch.device("meta"):
        sizes = (packed.in_features, packed.out_features)
        dense = Conv1D(sizes[1], sizes[0]) if packed.transposed else nn.Linear(*sizes, bias=packed.bias is not None)
    dense.weight = nn.Parameter(packed.weight.contiguous())
    dense.bias = packed.bias
    return dense


@torch.no_grad()
def unpack(model: nn.Module) -> list[str]:
    """Put ordinary dense layers with zeros in the places of all packed layers of ``model``, one at a time.

    Returns:
        The paths of the layers.
    """
    paths = list(packed_linears(model))
    for path in paths:
        packed = model.get_submodule(path)
        assert isinstance(packed, PackedLinear)
        replace_modules(model, {path: dense_linear(packed)})
    return paths


def unpacked_state(model: nn.Module) -> Iterator[tuple[str, Tensor | PackedLinear]]:
    """The ``state_dict`` of the dense model: the packed layer itself in the place of its weight, all else as it is."""
    packed = packed_linears(model, everywhere=True)
    parts = {f"{path}.{name}" for path, module in packed.items() for name, _ in module.named_buffers()}
    weights = {f"{path}.weight": module for path, module in packed.items()}
    state = model.state_dict()
    yield from weights.items()
    yield from ((name, tensor) for name, tensor in state.items() if name not in parts)
