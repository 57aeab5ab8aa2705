"""Ada-KV: the heads of a layer compete for its budget.

Paper: Feng et al. 2024, https://arxiv.org/abs/2407.11550, Algorithm 1: the best entries of all heads of a layer
together say how many each head keeps, so that heads with scattered attention keep more; a safeguard gives each head a
part of the even budget before.

As in the authors' code, and not as a mixture of the two budgets, the safeguard is each head's own best ``safeguard``
of the even budget, and the rest is competed for. Heads here are KV heads; what a head gives up is freed.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import EvictionPolicy, best
from .snapkv import SnapKV
from .wrapped import Wrapped, with_budget_of


class AdaKV(EvictionPolicy):
    """Options of ``ada_kv``. In JSON and YAML the policy is a mapping of ``method`` and its options.

    Attributes:
        policy: which entries are best, by scores that can be compared between heads; its own ``num_keys``,
            ``density``, ``every`` and ``layers`` are not looked at, but those of this policy.
        safeguard: share of the even budget that every head keeps.
    """

    policy: Wrapped = SnapKV()
    safeguard: float = Field(0.2, ge=0, le=1)

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

    def allowance(self, cached: Cached, prompt: Prompt) -> Tensor:
        """That of the policy, which heads share."""
        return self.inner.allowance(cached, prompt)

    def budgets(self, score: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """How many of the layer's best entries each head has, ``[B, H_kv]``."""
        inside, even = cached.inside(), self.allowance(cached, prompt)
        score = score.masked_fill(~inside, -torch.inf)
        safe = best(score, (even * self.safeguard).floor().long()) & inside
        raised = score.masked_fill(safe, torch.inf).flatten(1)
        return (best(raised, even.sum(-1)).view_as(inside) & inside).sum(-1)

    def settled(self, cached: Cached, prompt: Prompt) -> bool:
        """Whether the heads together are within their budget."""
        return bool((cached.lengths.sum(-1) <= self.allowance(cached, prompt).sum(-1)).all())
