"""Streaming heads: some KV heads read only the first keys and the latest ones, the others everything.

Papers: Wu et al. 2024 (retrieval heads), https://arxiv.org/abs/2404.15574, whose heads must read everything while the
others need not; Xiao et al. 2024 (DuoAttention), https://arxiv.org/abs/2410.10819, which decodes so. Which heads stream
is found by `paucity.attention.retrieval_heads` or `paucity.attention.lserve`, or given.

Pages are read whole: a streaming head reads up to ``page_size - 1`` keys more than its sinks and as many more than its
window. Not here: a cache that drops what streaming heads do not read.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ...checks import fail
from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import DecodePolicy, Pages
from .refresh import same_width


class StreamingHeads(DecodePolicy):
    """Options of ``streaming_heads``.

    Attributes:
        streaming: for each layer of the model the KV heads that stream, by index.
        num_sinks: first keys that they read.
        window_size: latest keys that they read, the newest included.
        page_size: keys that are read together.
    """

    streaming: list[list[int]] = Field(min_length=1)
    num_sinks: int = Field(128, ge=0)
    window_size: int = Field(256, ge=1)
    page_size: int = Field(64, ge=1)

    def check_model(self, layers: Sequence[int], num_heads: int, num_kv_heads: int) -> None:
        """Raise InputError unless there is a row for every layer, of KV heads that the model has."""
        check_streaming("streaming_heads", self.streaming, layers, num_kv_heads)

    def select(self, query: Tensor, cached: Cached, prompt: Prompt) -> Pages | None:
        """Sinks and window for the heads that stream, every page for the others."""
        if not self.streaming[prompt.layer]:
            return None
        every = torch.arange(-(-cached.longest // self.page_size), device=query.device)
        every = every.where(every < -(-cached.lengths // self.page_size).unsqueeze(-1), -1)
        near = stream_pages(cached.lengths, self.num_sinks, self.window_size, self.page_size)
        return Pages(by_head(self.streaming[prompt.layer], near, every), self.page_size)


def stream_pages(lengths: Tensor, num_sinks: int, window_size: int, page_size: int) -> Tensor:
    """Pages with one of the first ``num_sinks`` or last ``window_size`` keys of lists of ``lengths`` ``[B, H_kv]``.

    Returns:
        ``[B, H_kv, n]`` int64, ``n`` the same whatever the lengths, -1 is none.
    """
    device, sinks = lengths.device, -(-num_sinks // page_size)
    last = ((lengths - 1) // page_size).unsqueeze(-1)
    near = (lengths - window_size).clamp(min=0).unsqueeze(-1) // page_size
    near = near + torch.arange((window_size - 1) // page_size + 2, device=device)
    first = torch.arange(sinks, device=device).expand(*lengths.shape, -1)
    return torch.cat([first.where(first <= last, -1), near.where((near >= sinks) & (near <= last), -1)], dim=-1)


def by_head(streaming: Sequence[int], near: Tensor, others: Tensor) -> Tensor:
    """``near`` ``[B, H_kv, n]`` for the heads of ``streaming``, ``others`` ``[B, H_kv, m]`` for the rest."""
    streams = torch.zeros(near.shape[1], 1, dtype=torch.bool, device=near.device)
    streams[list(streaming)] = True
    near, others = same_width(near, others)
    return torch.where(streams, near, others)


def check_streaming(method: str, streaming: Sequence[Sequence[int]], layers: Sequence[int], num_kv_heads: int) -> None:
    """Raise InputError unless ``streaming`` has a row for every layer, of KV heads that the model has."""
    if len(streaming) != max(layers) + 1:
        raise fail(method, "streaming", f"have {max(layers) + 1} layers", len(streaming))
    for head in (head for row in streaming for head in row):
        if not 0 <= head < num_kv_heads:
            raise fail(method, "streaming", f"name KV heads below {num_kv_heads}", head)
