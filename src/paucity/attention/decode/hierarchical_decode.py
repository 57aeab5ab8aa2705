"""HiP while decoding: the search down a binary tree finds the keys of a step, and holds for a few steps.

Paper: Lee et al. 2024 (HiP), https://arxiv.org/abs/2406.09827, Sec. 3 and its mask refreshed at intervals in decoding.

As in `paucity.attention.hierarchical`, with one query: the first ``num_sinks`` keys and the latest ``window_size`` are
read; of those between, cut into ``k / k_block`` equal segments, halves are scored by the product with a representative
block of keys and the best half of them split again, down to blocks of ``k_block``: O(k log(T / k)) products. What was
found is kept for ``refresh_every`` tokens; the window reaches back to where it began then, so that no key falls between
it and what was searched.

Queries that share a KV head search together, as the queries of a block do in prompts: by the highest product among
them. Lists of one batch that differ in length are searched one length after another. Not here: different intervals for
different stages, and the offloaded cache, of later work.
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...checks import fail
from ...kernels.tree import tree_select
from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import DecodePolicy, Pages
from .refresh import refreshed, same_width


class HierarchicalDecode(DecodePolicy):
    """Options of ``hierarchical_decode``.

    Attributes:
        k: keys that the search keeps, a multiple of ``k_block``.
        k_block: keys that are scored and kept together.
        window_size: latest keys that are read, the newest included.
        num_sinks: keys at the start that are read.
        refresh_every: tokens that what was found holds for; 8 is that of the authors' code.
    """

    k: int = Field(512, ge=1)
    k_block: int = Field(2, ge=1)
    window_size: int = Field(128, ge=1)
    num_sinks: int = Field(4, ge=0)
    refresh_every: int = Field(8, ge=1)

    @model_validator(mode="after")
    def _whole_blocks(self) -> "HierarchicalDecode":
        if self.k % self.k_block:
            raise fail("hierarchical_decode", "k", f"be a multiple of k_block ({self.k_block})", self.k)
        return self

    def select(self, query: Tensor, cached: Cached, prompt: Prompt) -> Pages:
        """Sinks, what was found, and all since the window began."""
        choice = refreshed(self, cached, self.refresh_every, lambda: self._search(query, cached, prompt))
        since = (choice.lengths - self.window_size).clamp(min=0).unsqueeze(-1)
        since = since + torch.arange(self.window_size + self.refresh_every - 1, device=query.device)
        near = since.where(since < cached.lengths.unsqueeze(-1), -1)
        return Pages(torch.cat([choice.numbers, near], dim=-1), 1)

    def _search(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """The keys before the window that are read, ``[B, H_kv, n]``."""
        starts, lengths = cached.starts.flatten(), cached.lengths.flatten()
        rows = query.reshape(len(lengths), query.shape[1] // cached.lengths.shape[1], query.shape[-1])
        parts = []
        for length in sorted(set(lengths.tolist())):
            where = (lengths == length).nonzero().flatten()
            store = cached.store
            keys = store.rectangle(store.keys, starts[where].unsqueeze(0), lengths[where].unsqueeze(0))
            parts.append((where, self._found(rows[where].unsqueeze(0), keys, prompt.window)[0]))
        found = torch.cat(same_width(*(numbers for _, numbers in parts)))
        order = torch.cat([where for where, _ in parts]).argsort()
        return found[order].view(*cached.lengths.shape, -1)

    def _found(self, rows: Tensor, keys: Tensor, window: int | None) -> Tensor:
        """As `_search`, for the queries ``[1, n, G, D]`` of lists of one length, ``[1, n, T, D]``."""
        group, length = rows.shape[2], keys.shape[2]
        near = max(0, length - self.window_size)  # what is read in any case begins there
        if near <= self.num_sinks + self.k or length < group:
            return torch.arange(near, device=rows.device).expand(*rows.shape[:2], -1)
        # The search takes the last queries of a text, in whole blocks; the group is its last block.
        end = length - length % group
        ahead = max(1, end - group + 1 - near)
        lists = tree_select(
            rows,
            keys[:, :, :end],
            k=self.k,
            q_block=group,
            k_block=self.k_block,
            window_size=ahead,
            num_sinks=self.num_sinks,
            window=window,
        )
        positions = lists.positions[:, :, 0].long()
        return positions.where(positions < near, -1)
