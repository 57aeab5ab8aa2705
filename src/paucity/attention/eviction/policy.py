"""What an eviction policy is: a score for every cached key, and how many of them each list keeps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ...checks import check_shape
from ...ops.blocks import soft_capped
from ..cache.cached import Cached
from ..cache.store import Store
from ..prompt import Prompt


class EvictionPolicy(BaseModel, ABC):
    """Options of a method, and its score. One level of classes lies below, one per method; each is portable as JSON.

    After a prompt every list is cut to its budget. With ``every`` the cache is kept within the budget while tokens are
    generated, too: whenever it is exceeded, ``every`` entries go at once. Several tokens in one pass are a prompt, a
    further turn as well as a draft that is verified: assisted decoding evicts more often than steps of one token do.

    Attributes:
        num_keys: entries that a list keeps.
        density: share of the text that it keeps, instead of ``num_keys``.
        every: entries that are evicted at a time during generation; 0 evicts after prompts alone.
        layers: which layers the policy rules; None is all, the others keep everything.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    num_keys: int = Field(1024, ge=1)
    density: float | None = Field(None, gt=0, le=1)
    every: int = Field(0, ge=0)
    layers: list[int] | None = None

    @property
    def lookback(self) -> int:
        """How many of the newest queries `score` wants to see, those of earlier prompts and steps included."""
        return 1

    @abstractmethod
    def score(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """How much each entry is worth, ``[B, H_kv, longest]`` float32; higher is kept, inf stays whatever happens.

        Args:
            query: ``[B, H, Tq, D]`` after the position embedding, of the newest ``Tq`` tokens: all of a prompt, and at
                least the `lookback` as far as there were so many. A row with padding has padding first among them.
            cached: the lists; what is beyond the end of a list may have any score.
            prompt: the layer, scale, softcap and position embedding.
        """

    def observe(self, query: Tensor, cached: Cached, prompt: Prompt) -> None:
        """Look at every prompt and step, before anything is evicted; for scores that add up over time."""

    def budgets(self, score: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """Entries that each list keeps, ``[B, H_kv]`` int64; by default the same for all lists of a row."""
        return self.allowance(cached, prompt)

    def allowance(self, cached: Cached, prompt: Prompt) -> Tensor:
        """Entries of a list on average over the layer, as far as that can be told without scores; ``[B, H_kv]``."""
        return self.even_budgets(cached)

    def even_budgets(self, cached: Cached) -> Tensor:
        """``num_keys`` for each list, or ``density`` of the tokens that its row has seen, at least one."""
        if self.density is None:
            return torch.full_like(cached.lengths, self.num_keys)
        return (cached.num_text * self.density).round().long().clamp(min=1).unsqueeze(-1).expand_as(cached.lengths)

    def keep(self, query: Tensor, cached: Cached, prompt: Prompt, spare: int = 0) -> Tensor | None:
        """Which entries stay, ``[B, H_kv, longest]`` bool: the best of each list, the later of equals.

        Args:
            query: as in `score`.
            cached: as in `score`.
            prompt: as in `score`.
            spare: entries that a list which is over its budget gives up on top.

        Returns:
            None where all lists are within their budgets.
        """
        if self.settled(cached, prompt):
            return None
        score, inside = self.score(query, cached, prompt), cached.inside()
        check_shape(type(self).__name__, "score", score, *inside.shape)
        score = score.nan_to_num(-torch.inf, torch.inf, -torch.inf)  # what is no number is worth nothing
        budget = self.budgets(score, cached, prompt)
        over = cached.lengths > budget
        if not over.any():
            return None
        budget = torch.where(over, (budget - spare).clamp(min=1), cached.lengths)
        return best(score.masked_fill(~inside, -torch.inf), budget) & inside

    def settled(self, cached: Cached, prompt: Prompt) -> bool:
        """Whether it can be told without scores that all lists are within their budgets."""
        return bool((cached.lengths <= self.allowance(cached, prompt)).all())

    def restore(self, store: Store, num_new: int) -> bool:
        """Before anything is looked at after ``num_new`` tokens: bring back what `put_away` took; False: look not."""
        return True

    def put_away(self, store: Store) -> None:
        """After all that, where something was evicted now or before: keep what stays in another way."""

    def attend(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """Attention over what is left, ``[B, H, Tq, Dv]``."""
        return cached.attend(query, prompt)

    @property
    def own_attention(self) -> bool:
        """Whether `attend` is more than attention over the lists, so that no decode policy can stand in for it."""
        return type(self).attend is not EvictionPolicy.attend

    def check_model(self, layers: Sequence[int], num_heads: int, num_kv_heads: int) -> None:
        """Raise InputError if the policy is for another model than one with these layers and heads."""


def best(score: Tensor, budget: Tensor) -> Tensor:
    """The ``budget`` entries of each list with the highest score, as a mask; the later of equals.

    Args:
        score: ``[..., L]``.
        budget: ``[...]`` int64.
    """
    order = score.flip(-1).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order))
    return rank.flip(-1) < budget.unsqueeze(-1)


def probabilities(query: Tensor, cached: Cached, prompt: Prompt, *, later: int = 0) -> Tensor:
    """Attention of the newest queries over what is left of their lists, ``[B, H, Tq, longest]`` float32.

    Args:
        query: ``[B, H, Tq, D]``, of the newest ``Tq`` tokens. The row of one that is padding is 0.
        cached: the lists.
        prompt: scale and softcap.
        later: tokens that are newer still than these.
    """
    batch, heads, queries, dim = query.shape
    keys = cached.keys()
    groups = query.reshape(batch, keys.shape[1], -1, dim)
    logits = soft_capped(groups.float() @ keys.float().mT * prompt.scale, prompt.softcap)
    hidden = ~visible(queries, cached, later=later).unsqueeze(2)
    logits = logits.view(batch, keys.shape[1], -1, queries, keys.shape[2]).masked_fill_(hidden, -torch.inf)
    return logits.softmax(-1).nan_to_num_(0.0).view(batch, heads, queries, -1)


def visible(queries: int, cached: Cached, *, later: int = 0) -> Tensor:
    """Which entries the ``queries`` tokens before the newest ``later`` ones see, ``[B, H_kv, Tq, longest]`` bool."""
    stands = cached.num_seen - later + torch.arange(-queries, 0, device=cached.lengths.device)
    return (cached.positions().unsqueeze(2) <= stands.unsqueeze(-1)) & cached.inside().unsqueeze(2)


def by_group(x: Tensor, num_kv_heads: int) -> Tensor:
    """The mean of ``x`` ``[B, H, ...]`` over the query heads of each KV head, ``[B, H_kv, ...]``."""
    return x.reshape(len(x), num_kv_heads, -1, *x.shape[2:]).mean(2)
