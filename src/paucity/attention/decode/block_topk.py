"""Block top-k for steps: the pages of the cache whose mean key is nearest to the query.

Paper: Sadhukhan et al. 2025, "Kinetics: Rethinking Test-Time Scaling Laws", https://arxiv.org/abs/2506.05333, Sec. 5
("block top-k attention"). A page of 16 keys is scored by the product of the query and the mean of its keys, averaged
over the queries that share a KV head, and the best pages are read, 64 of them by default. The paper's code keeps four
keys at the start and a window of recent ones besides, and leaves the first layer dense; so does this.

Here first and recent keys are read in whole pages, and count towards ``num_keys`` (in the paper's code they are single
keys on top of the budget, and pages count from behind the first four). A page that is not full yet is always read.
"""

from pydantic import Field
from torch import Tensor

from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import DecodePolicy, Pages
from .scores import grouped, top_pages


class BlockTopKDecode(DecodePolicy):
    """Options of ``block_topk_decode``.

    Attributes:
        num_keys: keys that each KV head reads at most, in whole pages; one page at least.
        page_size: keys of a page.
        num_sinks: keys at the start whose pages are always read.
        window_size: newest keys, the token itself included, whose pages are always read.
    """

    num_keys: int = Field(1024, ge=1)
    page_size: int = Field(16, ge=1)
    num_sinks: int = Field(4, ge=0)
    window_size: int = Field(64, ge=1)
    dense_layers: int = Field(1, ge=0)

    def select(self, query: Tensor, cached: Cached, prompt: Prompt) -> Pages:
        """The newest pages, the first, and those with the best means, as many as the budget has."""
        size = self.page_size
        (means,) = cached.index("means", size, mean_keys, partial=False)
        rows = grouped(query, means.shape[1]).mean(2, keepdim=True)
        score = (rows @ means.mT).squeeze(2)
        first, last = -(-self.num_sinks // size), -(-(self.window_size - 1) // size) + 1
        count = max(1, self.num_keys // size)
        found = top_pages(score, cached, count, page_size=size, first=first, last=last, window=prompt.window)
        return Pages(found, size)


def mean_keys(keys: Tensor, counts: Tensor) -> tuple[Tensor]:
    """The mean key of each page ``[B, H_kv, n, D]`` in the dtype of ``keys``; see `page_index.Summarise`.

    Args:
        keys: ``[B, H_kv, n, page_size, D]``.
        counts: ``[B, H_kv, n, page_size]`` bool.
    """
    if bool(counts.all()):
        return (keys.mean(-2),)
    return ((keys * counts.unsqueeze(-1)).sum(-2) / counts.sum(-1, keepdim=True).clamp(min=1),)
