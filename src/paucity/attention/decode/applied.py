"""A decode policy in force on a model: which cached keys a step reads, and what was counted while it did."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..cache.cached import Cached
from ..install import uninstall
from ..portable import label
from ..prompt import Prompt
from ..site import Counts
from .policy import DecodePolicy


class AppliedDecode:
    """A decode policy in force on a model.

    Attributes:
        policy: how the pages are chosen.
        layers: the layers that it rules.
        counts: entries of the cache read, and steps (times layers) that read everything, by reason.
        select_seconds: time spent on choosing.
        paused: whether every step reads everything; see `pause`.
    """

    def __init__(self, model: nn.Module, policy: DecodePolicy, layers: list[int]) -> None:
        self.model, self.policy, self.layers, self.counts = model, policy, layers, Counts()
        self.select_seconds = 0.0
        self.paused = False

    def attend(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """Attention ``[B, H, 1, Dv]`` of the newest token, as the policy has it; counts what is read."""
        reason = None
        if self.paused:
            reason = "paused"
        elif cached.longest < self.policy.min_length:
            reason = "cache shorter than min_length"
        lengths = cached.lengths
        if reason is not None:
            self.counts.dense[reason] += 1
            self._count(prompt, lengths, lambda: lengths)
            return cached.attend(query, prompt)
        out, counted, seconds = self.policy.attend(query, cached, prompt)
        self.select_seconds += seconds
        self._count(prompt, lengths, counted)
        return out

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Read everything for a while, such as to verify what was drafted."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def _count(self, prompt: Prompt, lengths: Tensor, counted: Callable[[], Tensor]) -> None:
        heads, window = lengths.shape[1], prompt.window

        def share() -> tuple[Tensor, Tensor]:
            whole = lengths if window is None else lengths.clamp(max=window)
            return counted().clamp(max=whole) * heads, whole.sum(-1, keepdim=True)

        self.counts.later(prompt.layer, heads, share)

    def remove(self) -> None:
        """Take the policy off; with the last one the attention that the model had is restored."""
        uninstall(self.model, "decode")

    def reset(self) -> None:
        """Start measuring anew."""
        self.counts.clear()
        self.select_seconds = 0.0

    def density(self) -> dict[str, float]:
        """Entries of the cache that steps with one token read, as a share of those there are, mean over heads."""
        return {f"layers.{layer}.decode": float(share.mean()) for layer, share in self.counts.shares().items()}

    def state(self) -> dict[str, Any]:
        """Method, options, layers, and how many steps (times layers) read everything, by reason."""
        options = self.policy.model_dump(mode="json") | {"layers": self.layers}
        return {
            "method": label(self.policy),
            "options": options,
            "dense_steps": dict(sorted(self.counts.dense.items())),
        }
