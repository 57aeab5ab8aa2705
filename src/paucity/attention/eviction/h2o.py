"""H2O: heavy hitters, the keys with the most attention so far, and as many recent ones.

Paper: Zhang et al. 2023, https://arxiv.org/abs/2306.14048, Sec. 4 and Algorithm 1: every key has the sum of the
attention that all queries since its own paid to it; with each new token the key with the lowest sum goes, outside the
recent ones. Half of the budget is for recent keys, half for heavy hitters.

Sums are those of what was left at the time. A prompt is cut once, after its last query, by the sums over all of its
queries, which are computed for a part of the queries at a time. With grouped queries the sums of the heads that share a
KV head are averaged. Tokens that are taken back from the cache leave what they added.
"""

import torch
from pydantic import Field
from torch import Tensor

from ...kernels.lines import line_mass
from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import EvictionPolicy, by_group, probabilities

_AT_ONCE, _ROWS = 2**24, 512
SUMS = "h2o"


class H2o(EvictionPolicy):
    """Options of ``h2o``.

    Attributes:
        recent: share of the budget that is for the newest entries.
    """

    every: int = Field(1, ge=0)
    recent: float = Field(0.5, ge=0, le=1)

    def observe(self, query: Tensor, cached: Cached, prompt: Prompt) -> None:
        """Add the attention that the new tokens pay to every entry."""
        cached.set_extra(SUMS, cached.extra(SUMS) + attention_sums(query, cached, prompt))

    def score(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """Sums of attention; inf for the recent half."""
        recent = (self.allowance(cached, prompt) * self.recent).floor()
        place = torch.arange(cached.longest, device=query.device)
        late = place >= (cached.lengths - recent).unsqueeze(-1)
        return cached.extra(SUMS).masked_fill(late, torch.inf)


def attention_sums(query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
    """Attention that the newest tokens pay to every entry in all, ``[B, H_kv, longest]``; a mean over shared heads.

    Args:
        query: ``[B, H, Tq, D]``, theirs.
        cached: the lists.
        prompt: of the layer.
    """
    batch, heads, queries, _ = query.shape
    kv_heads, length = cached.lengths.shape[1], cached.longest
    total = query.new_zeros(batch, heads, length, dtype=torch.float32)
    if bool((cached.lengths == length).all()) and queries > 1:
        keys = cached.keys()
        for begin in range(0, queries, _ROWS):
            end = min(begin + _ROWS, queries)
            seen = length - queries + end
            mass, _ = line_mass(query[:, :, begin:end], keys[:, :, :seen], scale=prompt.scale, softcap=prompt.softcap)
            total[..., :seen] += mass
    else:  # lists of different lengths: rows with padding among them, or another turn after an eviction
        step = max(1, _AT_ONCE // max(1, batch * heads * length))
        for begin in range(0, queries, step):
            part, later = query[:, :, begin : begin + step], max(0, queries - begin - step)
            total += probabilities(part, cached, prompt, later=later).sum(2)
    return by_group(total, kv_heads)
