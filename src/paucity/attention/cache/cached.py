"""What a policy sees of a cached layer: the text of each row, without padding, in a list for each KV head."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.decode import decode_attention
from ..prompt import Prompt
from .page_index import PageIndex, Summarise
from .store import Store


@dataclass
class Cached:
    """The lists of a layer. Each is one row's text, or what an eviction policy left of it; padding is not in it.

    Attributes:
        store: the buffers that they lie in.
        starts: ``[B, H_kv]`` int64, where they begin.
        lengths: ``[B, H_kv]`` int64, entries of each.
        num_seen: tokens that the cache has seen, padding and evicted ones included.
        first: ``[B]`` int64, which of those the text of each row begins with; None is 0, the first of all.
        memory: what a policy remembers of this layer from step to step; forgotten when tokens are taken back, evicted
            or when the rows of the batch change.
        shared: the same for all layers of the cache together.
    """

    store: Store
    starts: Tensor
    lengths: Tensor
    num_seen: int
    first: Tensor | None
    memory: dict[str, Any]
    shared: dict[str, Any]
    _indexes: dict[str, PageIndex]

    @property
    def num_text(self) -> Tensor:
        """``[B]`` int64, tokens of each row's text, evicted ones included."""
        if self.first is None:
            return self.lengths.new_full((len(self.lengths),), self.num_seen)
        return self.num_seen - self.first

    @property
    def longest(self) -> int:
        """Entries of the longest list."""
        return int(self.lengths.max()) if self.lengths.numel() else 0

    @property
    def even(self) -> bool:
        """Whether all lists are equally long."""
        return bool((self.lengths == self.lengths.max()).all()) if self.lengths.numel() else True

    @property
    def intact(self) -> bool:
        """Whether every list holds the whole text of its row."""
        return bool((self.lengths == self.num_text.unsqueeze(-1)).all())

    def keys(self) -> Tensor:
        """``[B, H_kv, longest, D]``; what lies beyond a list is anything finite. A copy only where lists differ."""
        return self.store.rectangle(self.store.keys, self.starts, self.lengths)

    def values(self) -> Tensor:
        """``[B, H_kv, longest, Dv]``, like `keys`."""
        return self.store.rectangle(self.store.values, self.starts, self.lengths)

    def positions(self) -> Tensor:
        """``[B, H_kv, longest]`` int32: which token of its row an entry is, padding before the text included."""
        return self.store.rectangle(self.store.positions, self.starts, self.lengths)

    def extra(self, name: str) -> Tensor:
        """A figure of each entry, ``[B, H_kv, longest]`` float32, as `set_extra` left it; 0 for new entries."""
        if name not in self.store.extras:
            self.store.extras[name] = self.store.keys.new_zeros(len(self.store.keys), dtype=torch.float32)
        return self.store.rectangle(self.store.extras[name], self.starts, self.lengths)

    def set_extra(self, name: str, figures: Tensor) -> None:
        """Remember a figure of each entry, ``[B, H_kv, longest]``; it moves with the entry and goes with it."""
        self.extra(name)
        place = torch.arange(self.longest, device=figures.device)
        inside = place < self.lengths.unsqueeze(-1)
        self.store.extras[name][(self.starts.unsqueeze(-1) + place)[inside]] = figures.float()[inside]

    def inside(self) -> Tensor:
        """``[B, H_kv, longest]`` bool: which entries of the rectangle belong to their list."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths.unsqueeze(-1)

    def index(self, name: str, page_size: int, summarise: Summarise, *, partial: bool = True) -> tuple[Tensor, ...]:
        """Summaries of the pages of the lists, ``[B, H_kv, P, ...]``; what stands beyond a list's own is anything.

        They are made once and extended token by token.

        Args:
            name: of the index; one name, one kind of summary.
            page_size: keys of a page.
            summarise: see `page_index.Summarise`.
            partial: whether a page that is not full has a summary, which is then made anew with every token. Without
                it, ``P`` may be less than what the longest list begins.
        """
        index = self._indexes.setdefault(f"{name}/{page_size}/{partial}", PageIndex(page_size, partial))
        return index.extend(summarise, self.store, self.starts, self.lengths, self.num_seen)

    def attend(self, query: Tensor, prompt: Prompt, pages: Tensor | None = None, page_size: int = 1) -> Tensor:
        """Attention ``[B, H, Tq, Dv]`` of the newest tokens over the listed pages of each list; None is everything.

        Args:
            query: ``[B, H, Tq, D]``, of the last ``Tq`` entries of every list.
            prompt: scale, softcap and window.
            pages: ``[B or 1, H_kv or 1, n]`` integers; -1 is none.
            page_size: keys of a page.
        """
        return self.attend_part(query, prompt, pages, page_size)[0]

    def attend_part(
        self, query: Tensor, prompt: Prompt, pages: Tensor | None = None, page_size: int = 1, skip: int = 0
    ) -> tuple[Tensor, Tensor]:
        """`attend` with the logarithm of the softmax's denominator, ``[B, H, Tq]``, for parts that are merged by it.

        Args:
            query: as in `attend`.
            prompt: as in `attend`.
            pages: as in `attend`.
            page_size: as in `attend`.
            skip: entries at the start of every list that are left out; pages count from there.
        """
        shape = (*self.starts.shape, *self.store.keys.shape)
        starts, lengths = self.starts, self.lengths
        if skip:
            skipped = lengths.clamp(max=skip)
            starts, lengths = starts + skipped, lengths - skipped
        out, lse = decode_attention(
            query,
            self.store.keys.expand(shape),
            self.store.values.expand(*shape[:3], self.store.values.shape[-1]),
            pages,
            page_size=page_size,
            lengths=lengths,
            starts=starts,
            scale=prompt.scale,
            softcap=prompt.softcap,
            window=prompt.window,
            return_lse=True,
        )
        return out, lse
