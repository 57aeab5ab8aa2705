"""The blocks of a model one at a time: its sites by block, a forward that ends at a block, a block run by itself.

A `Walk` visits the blocks in turn with the calibration batches. Where a model's blocks feed each other and nothing else
(`Chain`), each block runs alone on hidden states that are kept between blocks; any other model (`Rerun`) starts anew.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .hooks import model_inputs
from .sites import BLOCK, Site


def block_path(site: Site) -> str:
    """Module path of the block that holds ``site``; outside the blocks the path of the site's own module."""
    found = BLOCK.search(site.module)
    return site.module if site.layer is None or found is None else site.module[: found.end(1)]


def sites_by_block(sites: Sequence[Site]) -> list[tuple[str, list[Site]]]:
    """``(block path, its sites)`` in the order of ``sites``."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(block_path(site), []).append(site)
    return list(found.items())


class UpTo(nn.Module):
    """``model`` with a forward that ends, without a result, when ``block`` has run; all names stay the model's."""

    def __init__(self, model: nn.Module, block: str) -> None:
        super().__init__()
        self.model, self.block = model, block

    def get_submodule(self, target: str) -> nn.Module:
        """The module that the model has at ``target``."""
        return self.model.get_submodule(target)

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter that the model has at ``target``."""
        return self.model.get_parameter(target)

    def forward(self, batch: Tensor) -> None:
        """Run ``batch`` (``input_ids [B, T]`` for a language model) as far as the block."""
        handle = self.get_submodule(self.block).register_forward_hook(_stop)
        try:
            with suppress(_Reached):
                _forward(self.model, batch)
        finally:
            handle.remove()


@dataclass(frozen=True)
class BlockCall:
    """What a block was called with in a forward of the whole model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states that the block was given, its first argument."""
        hidden: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    def with_hidden(self, hidden: Tensor) -> "BlockCall":
        """The same call with other hidden states."""
        if self.args:
            return BlockCall((hidden, *self.args[1:]), self.kwargs)
        return BlockCall((), self.kwargs | {"hidden_states": hidden})

    def others(self) -> tuple[Any, ...]:
        """All that the block was given but the hidden states."""
        rest = {name: value for name, value in self.kwargs.items() if self.args or name != "hidden_states"}
        return (*self.args[1:], rest)

    def interned(self, shared: list[Tensor]) -> "BlockCall":
        """The same call without hidden states, its tensors replaced by equal ones of ``shared``."""
        args, kwargs = _interned((self.args[1:], self.kwargs), shared)
        if self.args:
            return BlockCall((None, *args), kwargs)
        return BlockCall((), kwargs | {"hidden_states": None})

    @torch.no_grad()
    def run(self, block: nn.Module) -> Tensor:
        """The hidden states ``[B, T, hidden]`` that ``block`` makes of it."""
        output = block(*self.args, **self.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


@torch.no_grad()
def block_calls(model: nn.Module, block: str, batches: Sequence[Tensor]) -> list[BlockCall]:
    """The calls that ``block`` gets in a forward over each of ``batches``, which end there; no cache is used."""
    calls: list[BlockCall] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(BlockCall(args, dict(kwargs)))
        raise _Reached

    device = next(model.parameters()).device
    handle = model.get_submodule(block).register_forward_pre_hook(note, with_kwargs=True)
    try:
        for batch in batches:
            with suppress(_Reached):
                _forward(model, batch.to(device))
    finally:
        handle.remove()
    return calls


class Walk(ABC):
    """Calibration batches on their way through the blocks of a model, which change behind them."""

    @abstractmethod
    def peek(self, path: str) -> Iterator[None]:
        """Run block ``path``, which all before it have led up to, on every batch; yields after each."""

    @abstractmethod
    def advance(self, path: str) -> None:
        """Go past block ``path`` as it is now."""


class Rerun(Walk):
    """Every visit is a forward of the model that ends behind the block."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.model, self.batches = model, batches

    @torch.no_grad()
    def peek(self, path: str) -> Iterator[None]:
        """See `Walk.peek`."""
        device = next(self.model.parameters()).device
        last = UpTo(self.model, path)
        for batch in self.batches:
            last(batch.to(device))
            yield

    def advance(self, path: str) -> None:
        """Nothing is kept."""

    @torch.no_grad()
    def whole(self) -> Iterator[None]:
        """Run the whole model on every batch; yields after each."""
        device = next(self.model.parameters()).device
        for batch in self.batches:
            _forward(self.model, batch.to(device))
            yield


class Chain(Walk):
    """Each visit runs one block on the hidden states that the block before it made.

    The hidden states of all batches are held in the model's dtype; what else a block is called with (masks, positions)
    was noted beforehand and is shared between blocks and equal batches. Use `open_chain`.
    """

    def __init__(self, model: nn.Module, calls: dict[str, list[BlockCall]], hidden: list[Tensor]) -> None:
        self.model, self.calls, self.hidden = model, calls, hidden

    @torch.no_grad()
    def peek(self, path: str) -> Iterator[None]:
        """See `Walk.peek`."""
        block = self.model.get_submodule(path)
        for call, hidden in zip(self.calls[path], self.hidden, strict=True):
            call.with_hidden(hidden).run(block)
            yield

    @torch.no_grad()
    def advance(self, path: str) -> None:
        """See `Walk.advance`."""
        block = self.model.get_submodule(path)
        for index, call in enumerate(self.calls.pop(path)):
            self.hidden[index] = call.with_hidden(self.hidden[index]).run(block)


@torch.no_grad()
def open_chain(model: nn.Module, paths: Sequence[str], batches: Sequence[Tensor]) -> Chain | None:
    """A `Chain` over the blocks ``paths``, all blocks of the model in their order; None where that would not be exact.

    One forward over each batch skips every block but the first of the first batch. It is exact where each block takes
    the very tensor that the one before gave, and all else that it takes does not depend on that tensor.
    """
    if not isinstance(model, PreTrainedModel) or len(batches) == 0:
        return None
    first = _dry_run(model, paths, batches[0])
    if first is None:
        return None
    moved = _dry_run(model, paths, batches[0], factor=2.0)
    if moved is None or any(not _same(first[path].others(), moved[path].others()) for path in paths):
        return None
    calls: dict[str, list[BlockCall]] = {path: [] for path in paths}
    hidden: list[Tensor] = []
    shared: list[Tensor] = []
    for batch in batches:
        found = _dry_run(model, paths, batch)
        if found is None:
            return None
        hidden.append(found[paths[0]].hidden)
        for path in paths:
            calls[path].append(found[path].interned(shared))
    return Chain(model, calls, hidden)


def _dry_run(
    model: nn.Module, paths: Sequence[str], batch: Tensor, factor: float = 1.0
) -> "dict[str, BlockCall] | None":
    """What each block is called with when all are skipped, handing on ``factor`` times what the first takes."""
    found: dict[str, BlockCall] = {}
    handed: Tensor | None = None
    exact = True

    def skip(path: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal handed, exact
        call = BlockCall(args, kwargs)
        hidden = call.hidden
        exact &= path not in found and hidden.ndim == 3 and (handed is None or hidden is handed)
        found[path] = call
        handed = hidden * factor if handed is None and factor != 1.0 else hidden
        return handed

    with ExitStack() as stack:
        for path in paths:
            block = model.get_submodule(path)
            if "forward" in vars(block):  # somebody's own forward would be lost
                return None
            stack.callback(vars(block).pop, "forward")
            vars(block)["forward"] = partial(skip, path)
        try:
            with suppress(_Reached):
                handle = _behind(model, paths[-1])
                stack.callback(handle.remove)
                _forward(model, batch.to(next(model.parameters()).device))
        except (TypeError, AttributeError, IndexError, ValueError, RuntimeError):
            return None  # blocks of another kind, whose results are no single tensor
    return found if exact and list(found) == list(paths) else None


def _behind(model: nn.Module, path: str) -> RemovableHandle:
    return model.get_submodule(path).register_forward_hook(_stop)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    return True


def _interned(value: Any, shared: list[Tensor]) -> Any:
    """``value`` with every tensor that equals a shared one replaced by it; new ones join them."""
    if isinstance(value, Tensor):
        for known in shared:
            if known is value or (
                known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value)
            ):
                return known
        shared.append(value)
        return value
    if isinstance(value, tuple | list):
        return type(value)(_interned(entry, shared) for entry in value)
    if isinstance(value, dict):
        return {key: _interned(entry, shared) for key, entry in value.items()}
    return value


class _Reached(Exception):
    """The rest of the forward is not needed."""


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Reached


def _forward(model: nn.Module, batch: Tensor) -> None:
    if isinstance(model, PreTrainedModel):
        model(**model_inputs(model, batch))
    else:
        model(batch)
