"""What a decode policy is: from a new query to the pages of the cache that it reads."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..cache.cached import Cached
from ..prompt import Prompt

_FEW = 2**14
"""Page numbers that may wait to be counted."""


class Pages(NamedTuple):
    """What the queries of a KV head read: ``numbers`` ``[B, H_kv, n]`` integers, no page twice, -1 is none."""

    numbers: Tensor
    page_size: int


class Read(NamedTuple):
    """What a decode policy made of a step.

    Attributes:
        out: ``[B, H, Tq, Dv]``.
        counted: gives `kept`, which few steps need at once.
        select_seconds: time spent on choosing; on a GPU only that of the launches.
    """

    out: Tensor
    counted: Callable[[], Tensor]
    select_seconds: float

    @property
    def kept(self) -> Tensor:
        """``[B, H_kv]`` int64, entries of each list that were read."""
        return self.counted()


class DecodePolicy(BaseModel, ABC):
    """Options of a method, and its choice. One level of classes lies below, one per method; each is portable as JSON.

    A policy sees texts without padding, whatever the batch (see `Cached`), so that a batch gives what its rows give
    alone. Lists of one batch may differ in length.

    Attributes:
        min_length: lists with fewer entries are read whole.
        dense_layers: layers at the start of the model that read everything.
        layers: which layers the policy rules; None is all, the others read everything.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    min_length: int = Field(1024, ge=0)
    dense_layers: int = Field(0, ge=0)
    layers: list[int] | None = None

    @abstractmethod
    def select(self, query: Tensor, cached: Cached, prompt: Prompt) -> Pages | None:
        """The pages that a step reads; None is everything.

        Args:
            query: ``[B, H, 1, D]`` after the position embedding, of the newest entry of every list.
            cached: the lists, that entry included.
            prompt: the layer, scale, softcap and window.
        """

    def attend(self, query: Tensor, cached: Cached, prompt: Prompt) -> Read:
        """Attention of the newest token over what `select` chooses; shapes as there."""
        started = time.perf_counter()
        with torch.no_grad():
            whole = prompt.layer < self.dense_layers or not cached.lengths.numel()
            pages = None if whole else self.select(query.detach(), cached, prompt)
        seconds = time.perf_counter() - started
        lengths, window = cached.lengths, prompt.window
        if pages is None:
            return Read(cached.attend(query, prompt), lambda: lengths, seconds)
        out, short = cached.attend(query, prompt, *pages), lengths < self.min_length
        if bool(short.any()):  # some rows of a batch: they read everything, as they would alone
            dense = cached.attend(query, prompt)
            each = short.repeat_interleave(query.shape[1] // short.shape[1], dim=1)[..., None, None]
            out = torch.where(each, dense, out)

        def counted() -> Tensor:
            return torch.where(short, lengths, num_read(pages, lengths, window))

        if pages.numbers.numel() <= _FEW:
            return Read(out, counted, seconds)
        kept = counted()  # at once: many such lists are more memory than the cache
        return Read(out, lambda: kept, seconds)

    def check_model(self, layers: Sequence[int], num_heads: int, num_kv_heads: int) -> None:
        """Raise InputError if the policy is for another model than one with these layers and heads."""


def num_read(pages: Pages, lengths: Tensor, window: int | None = None) -> Tensor:
    """Entries of each list on the listed pages, ``[B, H_kv]`` int64; with a window, those within it."""
    size, ends = pages.page_size, lengths.unsqueeze(-1)
    first = pages.numbers.long() * size
    if window is None:
        counts = (ends - first).clamp(min=0, max=size)
    else:
        counts = (torch.minimum(first + size, ends) - torch.maximum(first, ends - window)).clamp(min=0)
    return counts.masked_fill(first < 0, 0).sum(-1).expand_as(lengths)
