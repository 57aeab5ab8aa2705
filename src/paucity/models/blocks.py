"""The blocks of a model one at a time: its sites by block, a forward that ends at a block, a block run by itself."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .sites import Site


def block_path(site: Site) -> str:
    """Module path of the block that holds ``site``; outside the blocks the path of the site's own module."""
    parts = site.module.split(".")
    return site.module if site.layer is None else ".".join(parts[: parts.index(str(site.layer)) + 1])


def sites_by_block(sites: Sequence[Site]) -> list[tuple[str, list[Site]]]:
    """``(block path, its sites)`` in the order of ``sites``."""
    return [(path, list(group)) for path, group in groupby(sites, key=block_path)]


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


class _Reached(Exception):
    """The rest of the forward is not needed."""


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Reached


def _forward(model: nn.Module, batch: Tensor) -> None:
    if isinstance(model, PreTrainedModel):
        model(batch, use_cache=False)
    else:
        model(batch)
