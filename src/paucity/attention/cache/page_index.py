"""Summaries of the pages of a cache, made once and extended with every token."""

from collections.abc import Callable

import torch
from torch import Tensor

from .store import Store

Summarise = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""From keys ``[B, H_kv, n, page_size, D]`` and which of them count, ``[B, H_kv, n, page_size]`` bool, to summaries
``[B, H_kv, n, ...]`` of each page; a page where nothing counts may have any finite summary."""

_AT_ONCE = 2**24
"""Numbers of the keys that are brought together at a time."""


class PageIndex:
    """Summaries of pages of ``page_size`` keys; pages count from the start of each list.

    Attributes:
        summaries: ``[B, H_kv, P, ...]`` each; pages beyond a list's own are anything finite.
    """

    def __init__(self, page_size: int, summarise: Summarise) -> None:
        self.page_size, self.summarise = page_size, summarise
        self.summaries: tuple[Tensor, ...] = ()
        self._starts: Tensor | None = None
        self._done: Tensor | None = None

    def extend(self, store: Store, starts: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """The summaries, brought up to the lists at ``starts`` with ``lengths``, ``[B, H_kv]`` each."""
        offset = starts - store.starts
        if self._done is None or self._starts is None or not torch.equal(offset, self._starts):
            self._done, self._starts, self.summaries = torch.zeros_like(lengths), offset, ()
        first = self._done // self.page_size  # the last page was not full, or ends exactly there
        missing = -(-lengths // self.page_size) - first
        most = int(missing.max()) if missing.numel() else 0
        each = max(1, _AT_ONCE // max(1, lengths.numel() * self.page_size * store.keys.shape[-1]))
        for begin in range(0, most, each):
            self._add(store, starts, lengths, first + begin, min(each, most - begin))
        self._done = lengths.clone()
        return self.summaries

    def crop(self, starts: Tensor, lengths: Tensor) -> None:
        """Forget what lies beyond lists that have become shorter."""
        if self._done is not None and self._starts is not None:
            self._done = torch.minimum(self._done, (lengths - self._starts).clamp(min=0))

    def select_rows(self, rows: Tensor) -> None:
        """Rows of the batch by index."""
        self.summaries = tuple(summary[rows] for summary in self.summaries)
        self._starts = None if self._starts is None else self._starts[rows]
        self._done = None if self._done is None else self._done[rows]

    def _add(self, store: Store, starts: Tensor, lengths: Tensor, first: Tensor, count: int) -> None:
        """Summaries of ``count`` pages of each list from page ``first`` on."""
        pages = first.unsqueeze(-1) + torch.arange(count, device=first.device)
        place = pages.unsqueeze(-1) * self.page_size + torch.arange(self.page_size, device=first.device)
        counts = place < lengths[..., None, None]
        keys = store.keys[(starts[..., None, None] + place).where(counts, 0)] if len(store.keys) else None
        if keys is None:
            return
        found = self.summarise(keys, counts)
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
