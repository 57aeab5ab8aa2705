"""What an attention module carries of the policies in force on its model, and the cache layer that it works with."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ..checks import InputError
from .cache.layer import SparseLayer
from .rotary import Rotary

if TYPE_CHECKING:
    from .decode.applied import AppliedDecode
    from .eviction.applied import AppliedEviction
    from .prefill import AppliedAttention

ATTRIBUTE = "attention_policies"
NAME = "paucity"
"""Of our attention, in transformers' registries."""
_MOST_WAITING = 256


@dataclass
class Site:
    """What an attention module carries.

    Attributes:
        layer: index of the layer in the model.
        num_layers: layers with attention in the model.
        rotary: how the layer turns positions.
        implementation: the attention that the model had before.
        prefill: the policy of prompts in force, if any.
        decode: the policy of single steps in force, if any.
        eviction: the policy of what stays in the cache, if any.
        cached: the layer of the cache that the module is called with, while it is called.
    """

    layer: int
    num_layers: int
    rotary: Rotary | None
    implementation: str
    prefill: "AppliedAttention | None" = None
    decode: "AppliedDecode | None" = None
    eviction: "AppliedEviction | None" = None
    cached: SparseLayer | None = None

    @property
    def in_force(self) -> "list[AppliedAttention | AppliedDecode | AppliedEviction]":
        """The policies, whichever there are."""
        return [applied for applied in (self.prefill, self.decode, self.eviction) if applied is not None]

    def take_layer(self, key: Tensor) -> SparseLayer | None:
        """The layer of the cache, once in a call, if ``key`` is what it gave; None where there is none.

        Some models change keys after the cache. It cannot be read by itself then, and is left alone.
        """
        layer, self.cached = self.cached, None
        if layer is not None and not layer.gave(key):
            self.leave("keys that are changed after the cache")
            return None
        return layer

    def leave(self, reason: str) -> None:
        """Note with the policies of steps and caches why they leave a cache alone."""
        for applied in (self.decode, self.eviction):
            if applied is not None and self.layer in applied.layers:
                applied.counts.dense[reason] += 1


class Counts:
    """What was computed, as a share of what the dense model computes; and how often that was the dense model's way."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}
        self._whole: dict[int, Tensor] = {}
        self._waiting: list[tuple[int, int, Callable[[], tuple[Tensor, Tensor]]]] = []
        self.dense: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()  # what is waiting cannot be saved
        return self.__dict__

    def add(self, layer: int, heads: int, kept: Tensor, whole: Tensor) -> None:
        """Add what was kept, ``[B, 1 or heads]``, and what there was, ``[B, 1]``."""
        self.later(layer, heads, lambda: (kept, whole))

    def later(self, layer: int, heads: int, count: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Add what ``count`` gives, as for `add`; not at once, but many together, as it would slow every step."""
        self._waiting.append((layer, heads, count))
        if len(self._waiting) == _MOST_WAITING:
            self._settle()

    def shares(self) -> dict[int, Tensor]:
        """Share of each head ``[heads]`` float64, by layer."""
        self._settle()
        return {layer: self._kept[layer] / self._whole[layer] for layer in sorted(self._kept)}

    def clear(self) -> None:
        """Start anew."""
        self._waiting.clear()
        self._kept.clear()
        self._whole.clear()
        self.dense.clear()

    def _settle(self) -> None:
        alike: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
        waiting, self._waiting = self._waiting, []
        for layer, heads, count in waiting:
            kept, whole = count()
            alike.setdefault((layer, heads, kept.shape, whole.shape, kept.device), []).append((kept, whole))
        for (layer, heads, *_), pairs in alike.items():
            kept, whole = (torch.stack(part).double().cpu() for part in zip(*pairs, strict=True))
            if whole.any():
                self._kept[layer] = self._kept.get(layer, torch.zeros(())) + kept.sum((0, 1)).expand(heads)
                self._whole[layer] = self._whole.get(layer, torch.zeros(())) + whole.sum()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def take_cache_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before an attention module is called: put a layer of ours in the place of an ordinary one in its cache.

    Raises:
        InputError: if something was evicted from the cache by another policy than the model's.
    """
    site = getattr(module, ATTRIBUTE, None)
    if not isinstance(site, Site):
        return
    cache = next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)
    other = getattr(getattr(module, "config", None), "_attn_implementation", NAME) != NAME
    layer, reason = (None, "attention of another kind") if other else _own_layer(cache, site.layer, module.training)
    if layer is not None:
        if layer.policy is not None and (site.eviction is None or site.eviction.policy != layer.policy):
            raise InputError("cache: model must carry the eviction policy that the cache is from, got another or none.")
        layer.expected = True
    site.cached = layer
    if reason is not None:
        site.leave(reason)


def _own_layer(cache: Cache | None, index: int, training: bool) -> tuple[SparseLayer | None, str | None]:
    """The layer of ours, or None and the reason why there is none."""
    if cache is None:
        return None, "no cache"
    if getattr(cache, "offloading", False):
        return None, "an offloaded cache"
    layers = cache.layers
    if index < len(layers) and isinstance(layers[index], SparseLayer):
        return layers[index], None
    lazy = index == len(layers) and cache.layer_class_to_replicate is DynamicLayer
    if not lazy and (index >= len(layers) or type(layers[index]) is not DynamicLayer):
        kind = type(layers[index]).__name__ if index < len(layers) else type(cache).__name__
        return None, f"a cache layer of another kind ({kind})"
    filled = not lazy and layers[index].get_seq_length() > 0
    if torch.is_grad_enabled() and (training or (filled and layers[index].keys.requires_grad)):
        return None, "gradients"
    own = SparseLayer(next((layer.shared for layer in layers if isinstance(layer, SparseLayer)), None))
    if lazy:
        layers.append(own)
        return own, None
    if filled:
        own.update(layers[index].keys, layers[index].values)
    layers[index] = own
    return own, None
