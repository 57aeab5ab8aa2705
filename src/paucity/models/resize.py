"""Layers of other sizes than a module was built with: their tensors replaced and their attributes corrected."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checks import fail

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TURNED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SIZES = (
    "in_features",
    "out_features",
    "nx",
    "nf",
    "in_channels",
    "out_channels",
    "groups",
    "num_features",
    "num_groups",
    "num_channels",
    "num_parameters",
    "embedding_dim",
)


def whole_groups(groups: int, width: int) -> bool:
    """How a grouped convolution shrinks: by whole groups, or by the same places of every group (of ``width`` inputs).

    By what leaves more choices.
    """
    return groups > 1 and groups >= width


def fit_to(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the layers of ``model`` the sizes of ``state`` and load it: how a shrunk model is read.

    Args:
        model: of the dense sizes, changed in place.
        state: names and dtypes of the model's own, no tensor larger.

    Raises:
        InputError: if the names differ, or a tensor has another number of dimensions; then nothing has changed.
    """
    mine = model.state_dict()
    if odd := sorted(set(mine) ^ set(state)):
        raise fail("fit_to", "state", "have exactly the tensors of the model", f"a difference in {', '.join(odd[:5])}")
    for name, tensor in state.items():
        if tensor.ndim != mine[name].ndim or any(a > b for a, b in zip(tensor.shape, mine[name].shape, strict=True)):
            got = f"{name} of shape {list(tensor.shape)}, dense {list(mine[name].shape)}"
            raise fail("fit_to", "state", "have tensors no larger than the model's", got)
    changed = {name: tensor.clone() for name, tensor in state.items() if tensor.shape != mine[name].shape}
    replace_tensors(model, changed)
    model.load_state_dict(dict(state))


def replace_tensors(model: nn.Module, smaller: Mapping[str, Tensor]) -> Callable[[], None]:
    """Put new tensors in place of parameters and buffers, everywhere where they are used, and correct the attributes.

    Args:
        model: changed in place; attributes of linear layers, convolutions, embeddings and norms are known.
        smaller: by name; copied to the device and dtype of what they replace.

    Returns:
        What undoes it: the very tensors and attributes from before are there again.
    """
    by_id: dict[int, Any] = {}
    for name, old in [*model.named_parameters(), *model.named_buffers()]:
        if name in smaller:
            value = smaller[name].to(old.device, old.dtype)
            by_id[id(old)] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    tables = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]

    def undo() -> None:
        for module, attributes in before:
            module.__dict__.update({name: attributes[name] for name in _SIZES if name in attributes})
        for module, parameters, buffers in tables:
            module._parameters.update(parameters)
            module._buffers.update(buffers)

    for module in model.modules():
        changed = False
        tables_of: tuple[dict[str, Any], dict[str, Any]] = module._parameters, module._buffers
        for table in tables_of:
            for key, old in list(table.items()):
                if old is not None and id(old) in by_id:
                    if key == "weight" and isinstance(module, (*_CONVS, *_TURNED)):
                        _fit_conv(module, old.shape, by_id[id(old)].shape)
                    table[key] = by_id[id(old)]
                    changed = True
        if changed:
            _fit(module)
    return undo


def _fit_conv(module: Any, old: torch.Size, new: torch.Size) -> None:
    groups, turned = module.groups, isinstance(module, _TURNED)
    width = old[0] // groups if turned else old[1]
    if whole_groups(groups, width):
        kept = new[0] // (old[0] // groups)
        module.groups, module.in_channels = kept, kept * width
        module.out_channels = new[1] * kept if turned else new[0]
    else:
        module.in_channels = new[0] if turned else new[1] * groups
        module.out_channels = new[1] * groups if turned else new[0]


def _fit(module: Any) -> None:
    values = next(value for value in (*module._parameters.values(), *module._buffers.values()) if value is not None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(values)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = len(values) * module.num_groups // module.num_channels
        module.num_channels = len(values)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(values)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
