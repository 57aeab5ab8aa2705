"""Quest: pages of the cache by an upper bound of their logits, from the range of their keys.

Paper: Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
https://arxiv.org/abs/2406.10774, Sec. 3.3. Of each page of 16 keys the smallest and the largest value of every channel
are kept. The score of a page is ``sum_d max(q_d * min_d, q_d * max_d)``, which no key on it exceeds; the pages with the
highest scores are read until the budget of tokens is used up. The first two layers read everything.

The two cases of the maximum are told apart by the sign of the query, so that the sum is one product:
``relu(q) . max - relu(-q) . min``.

The paper has one KV head for each query head. Here the queries that share a head share its pages, and the option
``join`` says how. The newest page is always read: it holds the token itself, and while it fills it needs no summary.
The authors' code reads three pages at least; here the budget holds.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import DecodePolicy, Pages
from .scores import grouped, top_pages


class Quest(DecodePolicy):
    """Options of ``quest``.

    Attributes:
        num_keys: keys that each KV head reads at most, in whole pages; one page at least.
        page_size: keys of a page.
        join: the score of a page for queries that share a KV head is the largest of theirs, or their mean, which is
            cheaper.
    """

    num_keys: int = Field(1024, ge=1)
    page_size: int = Field(16, ge=1)
    dense_layers: int = Field(2, ge=0)
    join: Literal["max", "mean"] = "max"

    def select(self, query: Tensor, cached: Cached, prompt: Prompt) -> Pages:
        """The newest page and those with the highest bounds, as many as the budget has."""
        (bounds,) = cached.index("quest", self.page_size, extremes, partial=False)
        score = bound_scores(query, bounds, self.join)
        count = max(1, self.num_keys // self.page_size)
        best = top_pages(score, cached, count, page_size=self.page_size, last=1, window=prompt.window)
        return Pages(best, self.page_size)


def extremes(keys: Tensor, counts: Tensor) -> tuple[Tensor]:
    """The largest and, after them, the smallest values of the channels of each page; see `page_index.Summarise`.

    Args:
        keys: ``[B, H_kv, n, page_size, D]``.
        counts: ``[B, H_kv, n, page_size]`` bool.

    Returns:
        ``[B, H_kv, n, 2 * D]`` in the dtype of ``keys``; 0 for a page where nothing counts.
    """
    if bool(counts.all()):
        return (torch.cat([keys.amax(-2), keys.amin(-2)], dim=-1),)
    left_out = ~counts.unsqueeze(-1)
    most, least = keys.masked_fill(left_out, -torch.inf).amax(-2), keys.masked_fill(left_out, torch.inf).amin(-2)
    return (torch.cat([most, least], dim=-1).masked_fill(~counts.any(-1, keepdim=True), 0),)


def bound_scores(query: Tensor, bounds: Tensor, join: Literal["max", "mean"]) -> Tensor:
    """What no logit on a page exceeds (before the model's scale), ``[B, H_kv, P]``, joined over the queries of a head.

    Args:
        query: ``[B, H, 1, D]``.
        bounds: ``[B, H_kv, P, 2 * D]`` of `extremes`.
        join: see `Quest`.
    """
    rows = grouped(query, bounds.shape[1])
    if bounds.dtype == torch.float16:  # products overflow before they are scaled
        rows, bounds = rows.float(), bounds.float()
    signed = torch.cat([rows.clamp(min=0), rows.clamp(max=0)], dim=-1)
    if join == "mean":
        return (signed.mean(2, keepdim=True) @ bounds.mT).squeeze(2)
    return (signed @ bounds.mT).amax(2)
