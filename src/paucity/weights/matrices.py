"""The weight of any site as a stack of matrices ``[matrices, rows, cols]``, of which each column is one input.

A linear layer (also transformers' ``Conv1D``) is one matrix, a stack of experts one for each expert. A convolution is
one for each of its groups, its columns being the places of the kernel and within a place the input channels, so that
N:M patterns run along channels and the inputs are the patches that `paucity.models.hooks.capture_inputs` gives.
"""

import torch
from torch import Tensor, nn

from ..models.sites import Site, weight_view


def num_matrices(model: nn.Module, site: Site) -> int:
    """How many matrices the weight of ``site`` is."""
    if site.kind == "conv":
        groups: int = getattr(model.get_submodule(site.module), "groups", 1)
        return groups
    view = weight_view(model, site)
    return view.shape[0] if view.ndim == 3 else 1


def as_matrices(model: nn.Module, site: Site, tensor: Tensor | None = None) -> Tensor:
    """``[matrices, rows, cols]`` of the weight, or of a tensor that lies like the parameter (a gradient, a mask).

    Shares memory with the model only where the layout allows it: write back with `from_matrices`.
    """
    view = weight_view(model, site)
    if tensor is not None:
        parameter = model.get_parameter(site.name)
        view = tensor if view.shape == parameter.shape and view.stride() == parameter.stride() else tensor.mT
    if site.kind == "conv":
        view = view.movedim(1, -1).flatten(1)
    count = num_matrices(model, site)
    return view.reshape(count, -1, view.shape[-1])


def from_matrices(model: nn.Module, site: Site, matrices: Tensor) -> Tensor:
    """The inverse of `as_matrices`: ``matrices`` in the layout of the parameter, contiguous like it."""
    view, parameter = weight_view(model, site), model.get_parameter(site.name)
    if site.kind == "conv":
        return matrices.reshape(view.movedim(1, -1).shape).movedim(-1, 1).contiguous()
    result = matrices.reshape(view.shape)
    transposed = (view.shape, view.stride()) != (parameter.shape, parameter.stride())
    return result.mT.contiguous() if transposed else result


def only(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight`` with zeros where ``mask`` (bool, of its shape) is False, anew; what it held there does not matter."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(weight.element_size())
    if integers is None:
        return weight.masked_fill(~mask, 0)
    return (weight.view(integers) * mask).view(weight.dtype)  # twenty times as fast as filling
