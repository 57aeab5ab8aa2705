"""An eviction policy in force on a model: what is dropped from its caches, and what was counted meanwhile."""

from typing import Any

import torch
from torch import Tensor, nn

from ..cache.cached import Cached
from ..cache.layer import SparseLayer
from ..install import uninstall
from ..portable import label
from ..prompt import Prompt
from ..site import Counts
from .policy import EvictionPolicy


class AppliedEviction:
    """An eviction policy in force on a model.

    Attributes:
        policy: how entries are scored.
        layers: the layers that it rules.
        counts: entries kept, and caches (times layers) that it left alone, by reason.
    """

    def __init__(self, model: nn.Module, policy: EvictionPolicy, layers: list[int]) -> None:
        self.model, self.policy, self.layers, self.counts = model, policy, layers, Counts()

    def attend(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """Attention ``[B, H, Tq, Dv]`` over what is left."""
        return self.policy.attend(query, cached, prompt)

    @torch.no_grad()
    def after(self, layer: SparseLayer, query: Tensor, prompt: Prompt, first: Tensor | None) -> None:
        """After the attention of a prompt or a step: evict what the policy does not keep.

        Args:
            layer: with the new tokens.
            query: ``[B, H, Tq, D]``, theirs.
            prompt: of the layer.
            first: ``[B]``, where the text of each row begins, as in ``layer.cached``.
        """
        assert layer.store is not None
        new = query.shape[2]
        recent = layer.store.remember(query.detach(), self.policy.lookback) if self.policy.lookback > 1 else query
        looked = self.policy.restore(layer.store, new)
        cached = layer.cached(first)
        if looked:
            self.policy.observe(query.detach(), cached, prompt)
            if new > 1 or self.policy.every:
                spare = max(0, self.policy.every - 1) if new == 1 else 0
                keep = self.policy.keep(recent.detach(), cached, prompt, spare)
                if keep is not None:
                    layer.evict(keep, cached.starts, self.policy)
            if layer.policy is not None:
                self.policy.put_away(layer.store)
        entries, text = layer.store.num_entries, cached.num_text.unsqueeze(-1)
        heads = entries.shape[1]
        self.counts.later(prompt.layer, heads, lambda: (torch.minimum(entries, text) * heads, text * heads))

    def remove(self) -> None:
        """Take the policy off; with the last one the attention that the model had is restored."""
        uninstall(self.model, "eviction")

    def reset(self) -> None:
        """Start measuring anew."""
        self.counts.clear()

    def density(self) -> dict[str, float]:
        """Entries cached after each prompt and step, as a share of the tokens seen, mean over heads."""
        return {f"layers.{layer}.cache": float(share.mean()) for layer, share in self.counts.shares().items()}

    def state(self) -> dict[str, Any]:
        """Method, options, layers, and how many caches (times layers) were left alone, by reason."""
        options = self.policy.model_dump(mode="json") | {"layers": self.layers}
        return {
            "method": label(self.policy),
            "options": options,
            "whole_caches": dict(sorted(self.counts.dense.items())),
        }
