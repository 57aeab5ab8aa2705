"""Heads taken away, to see what depends on them.

Paper: Wu et al. 2024 (retrieval heads), https://arxiv.org/abs/2404.15574, Sec. 4, where masked heads attend to nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...checks import fail
from ...models.sites import find_sites
from ...models.text_config import text_config


@contextmanager
def masked_heads(model: nn.Module, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
    """While it lasts, the outputs of some heads are zero.

    Args:
        model: a Hugging Face causal language model.
        heads: pairs of layer and query head.

    Raises:
        InputError: if the model lacks one of them.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    num_heads = text_config(model).num_attention_heads
    sites = {site.layer: site.module for site in find_sites(model, "o") if site.name.endswith(".weight")}
    for layer, gone in by_layer.items():
        if layer not in sites or not all(0 <= head < num_heads for head in gone):
            raise fail("masked_heads", "heads", f"be of {len(sites)} layers with {num_heads} heads", (layer, gone))
    with ExitStack() as stack:
        for layer, gone in by_layer.items():

            def zero(module: nn.Module, args: tuple[Any, ...], gone: list[int] = gone) -> tuple[Any, ...]:
                kept = torch.ones(num_heads, 1, dtype=args[0].dtype, device=args[0].device)
                kept[gone] = 0
                return ((args[0].unflatten(-1, (num_heads, -1)) * kept).flatten(-2), *args[1:])

            handle = model.get_submodule(sites[layer]).register_forward_pre_hook(zero)
            stack.callback(handle.remove)
        yield
