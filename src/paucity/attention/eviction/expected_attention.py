"""Expected attention: how much future queries, taken for a normal distribution, will attend to a key.

Paper: Devoto et al. 2025, https://arxiv.org/abs/2510.00636, Sec. 3: queries before the position embedding have mean
``mu`` and covariance ``Sigma``; turned to a future position and averaged over ``num_future`` of them, with ``R`` the
mean of the turns, the expected weight of key ``k`` is ``exp(s k^T R mu + s^2 / 2 k^T R Sigma R^T k)``, ``s`` being the
scale of the logits. Normalised over the keys, averaged over the heads that share them and multiplied by the norm of the
value, it is the score of an entry.

Differences: means and covariance are of the queries of the newest prompt, its first ``num_sinks`` tokens aside, or of
the last ``num_queries`` where that is more. A soft cap of the logits is left out of the expectation. It needs a
rotary embedding of a kind known.
"""

import torch
from pydantic import Field
from torch import Tensor

from ...checks import fail
from ..cache.cached import Cached
from ..prompt import Prompt
from ..rotary import Rotary
from .policy import EvictionPolicy


class ExpectedAttention(EvictionPolicy):
    """Options of ``expected_attention``.

    Attributes:
        num_future: positions after the text that are expected to ask.
        num_sinks: tokens at the start that always stay, and are not asked for their queries.
        num_queries: queries to remember for short turns and for ``every``.
        covariance: whether the covariance counts.
        value_norm: whether weights are multiplied by the norms of the values.
        epsilon: added to the weights before.
    """

    num_future: int = Field(512, ge=1)
    num_sinks: int = Field(4, ge=0)
    num_queries: int = Field(128, ge=1)
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = Field(0.0, ge=0)

    @property
    def lookback(self) -> int:
        """Queries that are remembered."""
        return self.num_queries

    def observe(self, query: Tensor, cached: Cached, prompt: Prompt) -> None:
        """Refuse a layer whose future queries cannot be told."""
        if prompt.rotary is None:
            raise fail("expected_attention", "model", "have a rotary position embedding of a kind known", "another")

    def score(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """Expected weight times the norm of the value; inf for sinks."""
        assert prompt.rotary is not None  # see `observe`
        mean, covariance = self._statistics(query, cached, prompt.rotary)
        keys, heads = cached.keys().float(), cached.lengths.shape[1]
        batch, dim = len(keys), keys.shape[-1]
        logits = mean.view(batch, heads, -1, dim) * prompt.scale @ keys.mT
        if self.covariance:
            spread = covariance.view(batch, heads, -1, dim, dim) * prompt.scale**2 / 2
            logits = logits + ((keys.unsqueeze(2) @ spread) * keys.unsqueeze(2)).sum(-1)
        place = torch.arange(cached.longest, device=query.device)
        sinks = place < self.num_sinks
        outside = (sinks | ~cached.inside()).unsqueeze(2)
        weights = logits.masked_fill(outside, -torch.inf).softmax(-1).nan_to_num(0.0).mean(2) + self.epsilon
        if self.value_norm:
            weights = weights * cached.values().float().norm(dim=-1)
        score: Tensor = weights.masked_fill(sinks, torch.inf)
        return score

    def _statistics(self, query: Tensor, cached: Cached, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Mean ``[B, H, D]`` and covariance ``[B, H, D, D]`` of the queries at the positions to come."""
        queries, last = query.shape[2], cached.num_seen - 1
        stands = cached.num_seen + torch.arange(-queries, 0, device=query.device)
        asked = (stands >= (cached.num_seen - cached.num_text + self.num_sinks).unsqueeze(-1))[:, None, :, None]
        asked = asked | (~asked.any(2, keepdim=True) & (stands == last)[:, None])  # of a text of sinks, the last one
        weight = asked / asked.sum(2, keepdim=True)
        at_last = rotary.turn(query.float(), stands, torch.full_like(stands, last))
        mean = (at_last * weight).sum(2)
        centred = (at_last - mean.unsqueeze(2)) * weight.sqrt()
        steps = torch.arange(1, self.num_future + 1, device=query.device)
        basis = torch.eye(query.shape[-1], device=query.device).unsqueeze(1).expand(-1, len(steps), -1)
        turn = rotary.turn(basis, torch.zeros_like(steps), steps).mean(1)  # row i is where basis vector i goes
        moved = centred @ turn
        return mean @ turn, moved.mT @ moved
