"""Summaries of the pages of a cache, made once and extended with every token."""

from collections.abc import Callable

import torch
from torch import Tensor

from .store import Store

Summarise = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""From keys ``[B, H_kv, n, page_size, D]`` and which of them count, ``[B, H_kv, n, page_size]`` bool, to summaries
``[B, H_kv, n, ...]`` of each page, in tensors of their own; a page where nothing counts may have any finite
summary."""

_AT_ONCE = 2**24
"""Numbers of the keys that are brought together at a time."""


class PageIndex:
    """Summaries of pages of ``page_size`` keys; pages count from the start of each list.

    Attributes:
        summaries: ``[B, H_kv, P, ...]`` each; what stands beyond a list's own pages is anything finite.
    """

    def __init__(self, page_size: int, partial: bool = True) -> None:
        """``partial``: whether a page that is not full has a summary."""
        self.page_size, self.partial = page_size, partial
        self.summaries: tuple[Tensor, ...] = ()
        self._offset: Tensor | None = None
        self._done: Tensor | None = None
        self._seen = 0
        self._idle: int | None = None  # tokens that may come after `_seen` before a summary is missing

    def extend(
        self, summarise: Summarise, store: Store, starts: Tensor, lengths: Tensor, num_seen: int
    ) -> tuple[Tensor, ...]:
        """The summaries, brought up to the lists at ``starts`` with ``lengths``, ``[B, H_kv]`` each.

        Args:
            summarise: the same at every call.
            store: where the lists lie.
            starts: of the lists.
            lengths: of the lists.
            num_seen: tokens that the cache has seen; between two calls all lists grow by as many as it does, unless
                `crop` or `select_rows` is called.
        """
        offset = starts - store.starts
        if self._done is None or self._offset is None or not torch.equal(offset, self._offset):
            self._done, self._offset, self._idle, self.summaries = torch.zeros_like(lengths), offset, None, ()
        if self._idle is not None and num_seen - self._seen <= self._idle:
            return self.summaries
        first = self._done // self.page_size  # the last page was not full, or ends exactly there
        whole = lengths // self.page_size
        missing = (-(-lengths // self.page_size) if self.partial else whole) - first
        most = int(missing.max()) if missing.numel() else 0
        each = max(1, _AT_ONCE // max(1, lengths.numel() * self.page_size * store.keys.shape[-1]))
        for begin in range(0, most, each):
            self._add(summarise, store, starts, lengths, first + begin, min(each, most - begin))
        if not self.summaries:  # no page is full
            nothing = store.keys.new_zeros(*lengths.shape, 1, self.page_size, store.keys.shape[-1])
            self._grow(summarise(nothing, torch.zeros_like(nothing[..., 0], dtype=torch.bool)), 1)
        self._done = lengths if self.partial else whole * self.page_size
        self._seen, self._idle = num_seen, 0
        if not self.partial and lengths.numel():
            self._idle = self.page_size - 1 - int((lengths % self.page_size).max())
        return self.summaries

    def crop(self, starts: Tensor, lengths: Tensor) -> None:
        """Forget what lies beyond lists that have become shorter."""
        if self._done is not None and self._offset is not None:
            self._done, self._idle = torch.minimum(self._done, (lengths - self._offset).clamp(min=0)), None

    def select_rows(self, rows: Tensor) -> None:
        """Rows of the batch by index."""
        self.summaries = tuple(summary[rows] for summary in self.summaries)
        self._offset = None if self._offset is None else self._offset[rows]
        self._done = None if self._done is None else self._done[rows]

    def _add(
        self, summarise: Summarise, store: Store, starts: Tensor, lengths: Tensor, first: Tensor, count: int
    ) -> None:
        """Summaries of ``count`` pages of each list from page ``first`` on."""
        span, skipped = count * self.page_size, first * self.page_size
        there = (lengths - skipped).clamp(min=0, max=span)
        keys = store.rectangle(store.keys, starts + skipped, there)
        keys = torch.nn.functional.pad(keys, (0, 0, 0, span - keys.shape[2])) if keys.shape[2] < span else keys
        counts = torch.arange(span, device=there.device) < there.unsqueeze(-1)
        shape = (*there.shape, count, self.page_size)
        found = summarise(keys.reshape(*shape, keys.shape[-1]), counts.view(shape))
        pages = first.unsqueeze(-1) + torch.arange(count, device=first.device)
        self._grow(found, int(pages.max()) + 1)
        slot = torch.arange(lengths.numel(), device=first.device).view(*lengths.shape, 1)
        for summary, new in zip(self.summaries, found, strict=True):
            flat = slot * summary.shape[2] + pages
            summary.view(-1, *summary.shape[3:])[flat.flatten()] = new.reshape(-1, *new.shape[3:])

    def _grow(self, found: tuple[Tensor, ...], pages: int) -> None:
        """Room for ``pages`` pages in each list."""
        have = self.summaries[0].shape[2] if self.summaries else 0
        if have >= pages:
            return
        room = max(pages, have + have // 8 + 8)
        grown = [new.new_zeros(*new.shape[:2], room, *new.shape[3:]) for new in found]
        for old, new in zip(self.summaries, grown, strict=False):
            new[:, :, :have] = old
        self.summaries = tuple(grown)
