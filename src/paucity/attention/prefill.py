"""A prefill policy in force on a model: what it computes, and what was counted while it did."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .compute import Attended, attend_exactly
from .install import uninstall
from .interface import exact_pairs
from .policy import PrefillPolicy, finite
from .portable import label
from .prompt import Prompt
from .site import Counts


class Observed(NamedTuple):
    """One attention that a policy computed: its inputs, as `PrefillPolicy.attend` has them, and what came out."""

    query: Tensor
    key: Tensor
    value: Tensor
    prompt: Prompt
    done: Attended


class AppliedAttention:
    """A prefill policy in force on a model.

    Attributes:
        policy: how the pattern is chosen.
        layers: the layers that it rules.
        counts: pairs of query and key, and prompts (times layers) that were computed densely, by reason.
    """

    def __init__(self, model: nn.Module, policy: PrefillPolicy, layers: list[int]) -> None:
        self.model, self.policy, self.layers, self.counts = model, policy, layers, Counts()
        self.observer: Callable[[Observed], None] | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, prompt: Prompt) -> Tensor:
        """Attention ``[B, H, Tq, Dv]`` of texts without padding, as the policy has it; counts what is computed."""
        reason = None
        length = key.shape[2] + prompt.dropped
        if length < self.policy.min_length:
            reason = "prompt shorter than min_length"
        elif not finite(query, key, value):
            reason = "values that are not finite"
        if reason is not None:
            self.counts.dense[reason] += 1
        done = attend_exactly(query, key, value, prompt) if reason else self.policy.compute(query, key, value, prompt)
        if self.observer is not None:
            if reason is None:
                self.observer(Observed(query, key, value, prompt, done))
            return done.out
        pairs = exact_pairs(query.shape[2], key.shape[2], prompt.window).expand(len(query), 1)
        self.counts.add(prompt.layer, query.shape[1], done.kept.expand(len(query), -1), pairs)
        return done.out

    def remove(self) -> None:
        """Take the policy off; with the last one the attention that the model had is restored."""
        uninstall(self.model, "prefill")

    def reset(self) -> None:
        """Start measuring anew."""
        self.counts.clear()

    def density(self) -> dict[str, float]:
        """Pairs of query and key computed in prompts, as a share of those of the dense model, mean over heads.

        Padding is not counted. For a sliding-window layer the dense model is the one with its window. A prompt that was
        computed densely counts as 1. Layers that have seen no prompt since the last reset are absent.
        """
        return {f"layers.{layer}.attention": float(share.mean()) for layer, share in self.counts.shares().items()}

    def head_density(self) -> Tensor:
        """`density` of every head, float32 ``[layers, H]``; empty before the first prompt."""
        shares = list(self.counts.shares().values())
        return torch.stack(shares).float() if shares else torch.zeros(0, 0)

    def state(self) -> dict[str, Any]:
        """Method, options, layers, and how many prompts (times layers) were computed densely, by reason."""
        options = self.policy.model_dump(mode="json") | {"layers": self.layers}
        return {
            "method": label(self.policy),
            "options": options,
            "dense_prompts": dict(sorted(self.counts.dense.items())),
        }
