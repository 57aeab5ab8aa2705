"""Cutting weights of a model in place, with a way back, and a state dict that stays an ordinary model's.

Where a configuration cannot say the sizes that a model has (different sizes layer by layer, or heads that no longer
fill the hidden size), the state dict of a cut module is filled up with zeros to the sizes that it can say, and is cut
again when it is loaded. So ``state_dict``, ``save_pretrained`` and ``load_state_dict`` always fit ``model.config``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...checks import fail


class Surgery:
    """A log of what was changed in ``model``.

    Args:
        model: to be changed in place.

    Attributes:
        filled: (module, parameter, dimension, entries in the state dict) of what is filled up there.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.filled: list[tuple[nn.Module, str, int, int]] = []
        self._undo: list[Callable[[], object]] = []

    def set(self, owner: Any, name: str, value: object) -> None:
        """Set an attribute, or take it away again at `undo` where there was none."""
        if isinstance(owner, nn.Module) or hasattr(owner, name):
            before = getattr(owner, name)
            self._undo.append(lambda: setattr(owner, name, before))
        else:
            self._undo.append(lambda: delattr(owner, name))
        setattr(owner, name, value)

    def cut(self, module: str, name: str, dim: int, index: Tensor, place: Tensor | None, full: int) -> None:
        """Keep the entries ``index`` of a parameter along ``dim``.

        Args:
            module: path of the owner.
            name: of the parameter.
            dim: along which it is cut.
            index: int64 ``[n]``, or ``[experts, n]`` for a choice of its own in every matrix of a stack.
            place: ``[n]``, where the kept entries lie in the state dict; None where it is not filled up.
            full: entries in the state dict.
        """
        owner = self.model.get_submodule(module)
        old: nn.Parameter = getattr(owner, name)
        new = nn.Parameter(take(old.detach(), dim, index.to(old.device)), requires_grad=old.requires_grad)
        self.set(owner, name, new)
        if name == "weight" and isinstance(owner, nn.Linear):
            self.set(owner, ("out_features", "in_features")[dim], new.shape[dim])
        elif name == "weight" and isinstance(owner, Conv1D):
            self.set(owner, ("nx", "nf")[dim], new.shape[dim])
        if place is not None:
            self.filled.append((owner, name, dim, full))
            self._undo += [handle.remove for handle in _install(owner, name, dim, place, full)]

    def saved_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter as the state dict has it."""
        result = {name: list(p.shape) for name, p in self.model.named_parameters(remove_duplicate=False)}
        paths = {id(module): path for path, module in self.model.named_modules()}
        for owner, name, dim, full in self.filled:
            if id(owner) in paths:
                result[f"{paths[id(owner)]}.{name}"][dim] = full
        return {name: tuple(shape) for name, shape in result.items()}

    def undo(self) -> None:
        """Everything as it was, the last change first."""
        while self._undo:
            self._undo.pop()()


def check_unfilled(function: str, model: nn.Module) -> None:
    """Refuse a model whose state dict is filled up: sizes can change only where a state dict has those of the model."""
    if any(isinstance(hook, _Fill) for module in model.modules() for hook in module._state_dict_hooks.values()):
        constraint = "be saved and loaded anew, as an earlier step fills up its state dict with zeros"
        raise fail(function, "model", constraint, type(model).__name__)


def fill_up(model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> Callable[[], None]:
    """Let the state dict keep the sizes of now when parameters and buffers are replaced by what is kept of them.

    Args:
        model: dense as yet.
        kept: name of a tensor to dimension to bool, True stays.

    Returns:
        What undoes it.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    by_id = {id(tensors[name]): dims for name, dims in kept.items()}
    handles = list[Any]()
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if name in module._non_persistent_buffers_set:
                continue
            for dim, stays in by_id.get(id(tensor), {}).items():
                handles += _install(module, name, dim, stays.nonzero().squeeze(-1), len(stays))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def take(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Entries ``index`` along ``dim``; of ``[experts, n]`` indices, row by row of the first dimension."""
    if index.ndim == 1:
        return tensor.index_select(dim, index)
    return torch.stack([part.index_select(dim - 1, rows) for part, rows in zip(tensor, index, strict=True)])


def _install(owner: Any, name: str, dim: int, place: Tensor, full: int) -> list[Any]:
    """Handles of the hooks that fill up a parameter or buffer of ``owner`` when saved, and cut it when loaded."""
    return [
        owner.register_state_dict_post_hook(_Fill(name, dim, place, full)),
        owner.register_load_state_dict_pre_hook(_Empty(name, dim, place, full)),
    ]


class _Fill:
    """A hook that fills a parameter up with zeros in a state dict; its inverse cuts it when one is loaded."""

    def __init__(self, name: str, dim: int, place: Tensor, full: int) -> None:
        self.parameter, self.dim, self.place, self.full = name, dim, place, full

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
        part = state[prefix + self.parameter]
        shape = list(part.shape)
        shape[self.dim] = self.full
        whole = part.new_zeros(shape)
        state[prefix + self.parameter] = whole.index_copy(self.dim, self.place.to(part.device), part)


class _Empty(_Fill):
    """The inverse of `_Fill`, before a state dict is loaded."""

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        whole = state.get(prefix + self.parameter)
        if whole is not None and whole.shape[self.dim] == self.full:
            state[prefix + self.parameter] = whole.index_select(self.dim, self.place.to(whole.device))
