"""Oracle top-k: the keys that a query attends to most, found by looking at all of them.

Paper: Sadhukhan et al. 2025 (Kinetics), https://arxiv.org/abs/2506.05333, Sec. 5, where it bounds what any selection
of as many keys can keep. It reads every key to choose, so that it saves nothing: a bound, not a method.
"""

from pydantic import Field
from torch import Tensor

from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import DecodePolicy, Pages
from .scores import exact_weights, top_pages


class OracleTopK(DecodePolicy):
    """Options of ``oracle_topk``.

    Attributes:
        num_keys: keys that each KV head reads: those with the largest attention, averaged over the queries that share
            the head.
    """

    num_keys: int = Field(256, ge=1)

    def select(self, query: Tensor, cached: Cached, prompt: Prompt) -> Pages:
        """The ``num_keys`` keys of every list with the largest exact weights."""
        return Pages(top_pages(exact_weights(query, cached, prompt).mean(2), cached, self.num_keys), 1)
