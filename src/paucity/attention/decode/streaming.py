"""Sinks and window for steps: a step reads the first keys of the cache and the newest.

Paper: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", https://arxiv.org/abs/2309.17453,
Sec. 3.2, for which keys; the sizes are those of its experiments, 1024 keys with 4 sinks.

It chooses without looking, and so is what any method that looks must beat at the same budget. Nothing is dropped from
the cache, and positions keep their numbers: a token stands as far behind the sinks as it does in the text.
"""

import torch
from pydantic import Field
from torch import Tensor

from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import DecodePolicy, Pages


class StreamingDecode(DecodePolicy):
    """Options of ``streaming_decode``.

    Attributes:
        num_sinks: keys at the start that every step reads.
        window_size: newest keys that a step reads, the token itself included.
    """

    num_sinks: int = Field(4, ge=0)
    window_size: int = Field(1020, ge=1)

    def select(self, query: Tensor, cached: Cached, prompt: Prompt) -> Pages:
        """The first and the newest keys of every list."""
        ends = cached.lengths.unsqueeze(-1)
        sinks = torch.arange(self.num_sinks, device=ends.device).expand(*cached.lengths.shape, -1)
        recent = ends - 1 - torch.arange(min(self.window_size, cached.longest), device=ends.device)
        recent = recent.masked_fill(recent < self.num_sinks, -1)
        return Pages(torch.cat([sinks.masked_fill(sinks >= ends, -1), recent], dim=-1).int(), 1)
