"""Entries that stay, in 8 or 4 bits, the newest as they are.

Paper: Liu et al. 2024 (KIVI), https://arxiv.org/abs/2402.02750, Sec. 3: keys by channel and groups of tokens, values by
token and 32 channels, the newest ``num_recent`` in full precision.

Another policy says which entries stay; with ``density`` 1 all do. Reading brings back a part at a time. When as many
new tokens have come in as stay in full precision, they join the others. Whatever is evicted then or after a further
prompt is chosen among entries that were brought back; what is packed again has almost, but not exactly, the same
numbers. A policy that adds up over time (``h2o``) sees prompts, and of the steps those in which entries are packed.
torch's own quantised tensors are deprecated and its packed 4-bit ones cannot be indexed, so bytes are packed here.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from ...kernels.attention.merge import merge_attention
from ..cache.cached import Cached
from ..cache.store import Store
from ..prompt import Prompt
from .knorm import Knorm
from .policy import EvictionPolicy
from .wrapped import Wrapped, with_budget_of


class Quantised(EvictionPolicy):
    """Options of ``quantised``. In JSON and YAML the policy is a mapping of ``method`` and its options.

    Attributes:
        policy: which entries stay; its own ``num_keys``, ``density``, ``every`` and ``layers`` are not looked at, but
            those of this policy. With ``every`` the cache is cut when entries are packed, not at every step.
        bits: of a number, 8 or 4.
        group_size: tokens that share the scales of their keys.
        num_recent: newest entries that stay as they are, at least.
    """

    density: float | None = Field(1.0, gt=0, le=1)
    policy: Wrapped = Knorm()
    bits: Literal[4, 8] = 4
    group_size: int = Field(32, ge=1)
    num_recent: int = Field(128, ge=1)

    @property
    def inner(self) -> EvictionPolicy:
        """The policy with the budget of this one."""
        return with_budget_of(self, self.policy)

    @property
    def lookback(self) -> int:
        """That of the policy."""
        return self.policy.lookback

    def check_model(self, layers: Sequence[int], num_heads: int, num_kv_heads: int) -> None:
        """As the policy has it."""
        self.policy.check_model(layers, num_heads, num_kv_heads)

    def observe(self, query: Tensor, cached: Cached, prompt: Prompt) -> None:
        """As the policy has it."""
        self.inner.observe(query, cached, prompt)

    def score(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """Those of the policy."""
        return self.inner.score(query, cached, prompt)

    def keep(self, query: Tensor, cached: Cached, prompt: Prompt, spare: int = 0) -> Tensor | None:
        """What the policy keeps; everything, where it says nothing."""
        keep = self.inner.keep(query, cached, prompt, spare)
        return cached.inside() if keep is None else keep

    def restore(self, store: Store, num_new: int) -> bool:
        """Bring everything back after a prompt, and when enough new tokens have come in."""
        due = num_new > 1 or store.longest >= 2 * self.num_recent + self.group_size
        if due:
            store.unpack()
        return due

    def put_away(self, store: Store) -> None:
        """Pack all but the newest."""
        if store.packed is None:
            store.pack(self.bits, self.group_size, self.num_recent)

    def attend(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """Attention over both parts, ``[B, H, Tq, Dv]``."""
        if cached.store.packed is None:
            return cached.attend(query, prompt)
        parts = (cached.attend_part(query, prompt), cached.store.packed.attend(query, prompt))
        out: Tensor = merge_attention([out for out, _ in parts], [lse for _, lse in parts])[0]
        return out
