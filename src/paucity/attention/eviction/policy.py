"""What an eviction policy is: a score for every cached key, and how many of them each list keeps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..cache.cached import Cached
from ..prompt import Prompt


class EvictionPolicy(BaseModel, ABC):
    """Options of a method, and its score. One level of classes lies below, one per method; each is portable as JSON.

    After a prompt every list is cut to its budget. With ``every`` the cache is kept within the budget while tokens are
    generated, too: whenever it is exceeded, ``every`` entries go at once.

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

    @abstractmethod
    def score(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """How much each entry is worth, ``[B, H_kv, longest]`` float32; higher is kept, inf stays whatever happens.

        Args:
            query: ``[B, H, Tq, D]`` after the position embedding, of the last ``Tq`` entries of every list; where a
                list is shorter than that, its first queries are padding (see `probabilities`).
            cached: the lists; what is beyond the end of a list may have any score.
            prompt: the layer, scale, softcap and position embedding.
        """

    def observe(self, query: Tensor, cached: Cached, prompt: Prompt) -> None:
        """Look at every prompt and step, before anything is evicted; for scores that add up over time."""

    def budgets(self, score: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """Entries that each list keeps, ``[B, H_kv]`` int64; by default the same for all lists of a row."""
        return self.even_budgets(cached)

    def even_budgets(self, cached: Cached) -> Tensor:
        """``num_keys`` for each list, or ``density`` of the tokens that its row has seen."""
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
        if self.settled(cached):
            return None
        score, inside = self.score(query, cached, prompt), cached.inside()
        budget = self.budgets(score, cached, prompt)
        over = cached.lengths > budget
        if not over.any():
            return None
        budget = torch.where(over, (budget - spare).clamp(min=1), cached.lengths)
        return best(score.masked_fill(~inside, -torch.inf), budget) & inside

    def settled(self, cached: Cached) -> bool:
        """Whether it can be told without scores that all lists are within their budgets."""
        return bool((cached.lengths <= self.even_budgets(cached)).all())

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


def probabilities(query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
    """Attention of the newest queries over their lists, ``[B, H, Tq, longest]`` float32.

    Args:
        query: ``[B, H, Tq, D]``, of the last ``Tq`` entries of every list. One that would stand before the list is
            padding, and its row is 0.
        cached: the lists.
        prompt: scale and softcap.
    """
    batch, heads, queries, dim = query.shape
    keys = cached.keys()
    groups = query.view(batch, keys.shape[1], -1, dim)
    logits = (groups.float() @ keys.float().mT * prompt.scale).view(batch, keys.shape[1], -1, queries, keys.shape[2])
    if prompt.softcap is not None:
        logits = torch.tanh(logits / prompt.softcap) * prompt.softcap
    stands = cached.lengths.unsqueeze(-1) - queries + torch.arange(queries, device=query.device)
    seen = torch.arange(keys.shape[2], device=query.device) <= stands.unsqueeze(-1)
    seen = seen.unsqueeze(2).expand_as(logits)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0).view(batch, heads, queries, -1)
