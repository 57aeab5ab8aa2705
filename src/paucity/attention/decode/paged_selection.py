"""LServe's decoding: the best pages by the bounds of their parts, chosen every few steps; some heads stream.

Paper: Yang et al. 2025 (LServe), https://arxiv.org/abs/2502.14866, Sec. 3.4-3.6.

A physical page of ``page_size`` keys has ``num_chunks`` logical ones, each with the least and the greatest value of
every channel over its keys. A query bounds its products with a logical page by ``sum_d max(q_d kmin_d, q_d kmax_d)``
(`paucity.attention.decode.quest`); a page scores the highest bound of its logical pages. Each KV head reads the last
page and the ``num_keys / page_size - 1`` best of the others, and keeps that choice for ``reselect_every`` tokens; pages
begun since are read too.

Which KV heads stream (read sinks and a window alone) is given, or found by `paucity.attention.lserve`. Queries that
share a KV head choose together, by the highest bound among them: the paper does not say how. Not here: the quantised
cache, and the fused kernel of prompts, for which `paucity.attention.lserve` makes a prefill policy of the same split.
"""

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...checks import fail
from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import DecodePolicy, Pages
from .quest import bound_scores, extremes
from .refresh import refreshed
from .scores import top_pages
from .streaming_heads import by_head, check_streaming, stream_pages


class PagedSelection(DecodePolicy):
    """Options of ``paged_selection``.

    Attributes:
        num_keys: keys that a head reads at most, those of the last page included; in whole pages.
        page_size: keys of a page.
        num_chunks: parts of a page that have bounds of their own; divides ``page_size``.
        reselect_every: tokens that a choice holds for.
        streaming: for each layer of the model the KV heads that read sinks and window alone; None is none.
        num_sinks: first keys that these read.
        window_size: latest keys that these read, the newest included.
    """

    num_keys: int = Field(4096, ge=1)
    page_size: int = Field(64, ge=1)
    num_chunks: int = Field(4, ge=1)
    reselect_every: int = Field(4, ge=1)
    streaming: list[list[int]] | None = Field(None, min_length=1)
    num_sinks: int = Field(128, ge=0)
    window_size: int = Field(256, ge=1)

    @model_validator(mode="after")
    def _whole_parts(self) -> "PagedSelection":
        if self.page_size % self.num_chunks:
            raise fail("paged_selection", "num_chunks", f"divide page_size ({self.page_size})", self.num_chunks)
        if self.num_keys < self.page_size:
            raise fail("paged_selection", "num_keys", f"be at least page_size ({self.page_size})", self.num_keys)
        return self

    def check_model(self, layers: Sequence[int], num_heads: int, num_kv_heads: int) -> None:
        """Raise InputError unless ``streaming`` has a row for every layer, of KV heads that the model has."""
        if self.streaming is not None:
            check_streaming("paged_selection", self.streaming, layers, num_kv_heads)

    def select(self, query: Tensor, cached: Cached, prompt: Prompt) -> Pages:
        """The best pages, those begun since they were chosen, and what streaming heads read."""
        streaming = self.streaming[prompt.layer] if self.streaming else []
        choice = refreshed(self, cached, self.reselect_every, lambda: self._best(query, cached, prompt))
        before, until, pages = cached.memory.get("pages", (None, 0, None))
        if before is not choice or cached.num_seen >= until:
            last = ((cached.lengths - 1) // self.page_size).unsqueeze(-1)
            begun = torch.arange(-(-(self.reselect_every - 1) // self.page_size), device=query.device)
            begun = begun + ((choice.lengths - 1) // self.page_size + 1).unsqueeze(-1)
            numbers = torch.cat([choice.numbers, begun.where(begun <= last, -1)], dim=-1)
            left = self.page_size - (cached.lengths - 1) % self.page_size  # tokens until a list begins a page
            if streaming:
                near = stream_pages(cached.lengths, self.num_sinks, self.window_size, self.page_size)
                numbers, left = by_head(streaming, near, numbers), torch.ones_like(left)
            pages = Pages(numbers, self.page_size)
            cached.memory["pages"] = choice, cached.num_seen + (int(left.min()) if left.numel() else 1), pages
        found: Pages = pages
        return found

    def _best(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """The last page of each list and the best of the others."""

        def summarise(keys: Tensor, counts: Tensor) -> tuple[Tensor]:
            parts = (*keys.shape[:2], keys.shape[2] * self.num_chunks, -1)
            (bounds,) = extremes(keys.view(*parts, keys.shape[-1]), counts.view(parts))
            return (bounds.view(*keys.shape[:3], self.num_chunks, -1),)

        size = self.page_size
        (bounds,) = cached.index(f"lserve {self.num_chunks}", size, summarise, partial=False)
        score = bound_scores(query, bounds.flatten(2, 3), "max").view(bounds.shape[:4]).amax(-1)
        return top_pages(score, cached, self.num_keys // size, page_size=size, last=1, window=prompt.window)
