"""Oracle top-p: the fewest keys that hold a share of a query's attention, found by looking at all of them.

Paper: Lin et al. 2025, "Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning",
https://arxiv.org/abs/2502.02770, Sec. 3.2 and 3.3 ("oracle top-p"): the smallest set of keys whose weights add up to
``p``. How many that are differs from head to head and from step to step.

It reads every key to choose, so that it saves nothing: a bound, not a method. Twilight's own estimate of the weights
(keys in 4 bits, for keys that another method proposed, and a search for the threshold) is not here. Queries that share
a KV head share the keys, chosen by the mean of their weights; the paper has the union of what each chooses.
"""

import torch
from pydantic import Field
from torch import Tensor

from ...ops.select import top_p_mask
from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import DecodePolicy, Pages
from .scores import exact_weights, seen


class TopP(DecodePolicy):
    """Options of ``top_p``.

    Attributes:
        p: share of the attention that the keys of each KV head hold together.
    """

    p: float = Field(0.95, gt=0, le=1)

    def select(self, query: Tensor, cached: Cached, prompt: Prompt) -> Pages | None:
        """The fewest keys of every list whose exact weights add up to ``p``."""
        if self.p == 1:  # rounding might leave something out
            return None
        mask = top_p_mask(exact_weights(query, cached, prompt).mean(2), p=self.p) & seen(cached, prompt)
        counts = mask.sum(-1, keepdim=True)
        most = int(counts.max()) if counts.numel() else 0
        first = mask.byte().argsort(dim=-1, descending=True, stable=True)[..., :most]
        return Pages(first.masked_fill(torch.arange(most, device=first.device) >= counts, -1).int(), 1)
