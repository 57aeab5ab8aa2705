"""Block-sparse FlashAttention: exact attention over the tiles that a fixed mask of blocks keeps.

Papers: Dao et al. 2022 (FlashAttention), https://arxiv.org/abs/2205.14135, Sec. 3.3 and Algorithm 5, for the attention;
Dao et al. 2021 (Pixelated Butterfly), https://arxiv.org/abs/2112.00029, Sec. 3, for its mask, the flat block butterfly.

A butterfly matrix is a product of ``log2 n`` factors; the factor of stride ``s`` joins the block ``i`` with itself and
with ``i XOR s``. Flat is the sum of the factors instead of their product, so that block ``i`` sees block ``j`` where
``i XOR j`` is 0 or a power of two up to the largest stride. Of that the causal half stays: ``i`` with one of its ones
set to zero, on average ``1 + log2(n) / 2`` blocks. The neighbour just before is among them for odd ``i`` alone:
``local_blocks`` adds near ones where a language model needs them.

Instead of the butterfly, ``distances`` or ``rows`` state the mask. Not here: the low-rank part of Pixelated Butterfly
(``sink_blocks`` is the nearest thing), masks that differ by head (`per_head` has one policy for each), dropout.
"""

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..checks import fail
from ..ops.formats.block import BlockMask
from ..ops.patterns import is_power_of_two, text_blocks, text_mask
from .policy import PrefillPolicy
from .prompt import Prompt

Index = Annotated[int, Field(ge=0)]


class BlockSparse(PrefillPolicy):
    """Options of ``block_sparse``. The mask is the butterfly, or one of ``distances`` and ``rows``.

    Attributes:
        max_stride: largest stride of the butterfly, in blocks, a power of two; None is as large as the text.
        distances: how many blocks back a block of queries sees; 0, its own, must be among them.
        rows: for each block of queries of the text the blocks of keys that it sees, its own among them; later ones are
            not computed. A text may have fewer blocks, not more.
        local_blocks: nearest blocks seen besides, the own included.
        sink_blocks: blocks at the start of the text seen besides.
        q_block: tokens in a block, of queries and of keys alike.
    """

    max_stride: int | None = Field(None, ge=1)
    distances: list[Index] | None = Field(None, min_length=1)
    rows: list[list[Index]] | None = Field(None, min_length=1)
    local_blocks: int = Field(1, ge=1)
    sink_blocks: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_mask(self) -> "BlockSparse":
        given = [name for name in ("max_stride", "distances", "rows") if getattr(self, name) is not None]
        if len(given) > 1:
            raise fail("block_sparse", "at most one of max_stride, distances and rows", "be given", given)
        if self.max_stride is not None and self.max_stride & (self.max_stride - 1):
            raise fail("block_sparse", "max_stride", "be a power of two", self.max_stride)
        if self.distances is not None and 0 not in self.distances:
            raise fail("block_sparse", "distances", "have 0, the block itself", self.distances)
        for index, row in enumerate(self.rows or ()):
            if index not in row:
                raise fail("block_sparse", "rows", f"have block {index} in row {index}", row)
        return self

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> BlockMask:
        """The same pattern for every head; ``query`` and ``key`` are not looked at.

        Raises:
            InputError: if the text has more blocks than there are ``rows``.
        """
        num_queries, num_keys = query.shape[2], key.shape[2]
        row, column = text_blocks(num_queries, num_keys, self.q_block, dropped=prompt.dropped, device=query.device)
        distance = row - column
        kept = self._mask(row, column) | (distance < self.local_blocks) | (column < self.sink_blocks)
        return text_mask(
            kept, num_queries, num_keys, block_size=self.q_block, dropped=prompt.dropped, window=prompt.window
        )

    def lookahead(self, length: int) -> int:
        """1: the pattern is fixed."""
        return 1

    def _mask(self, row: Tensor, column: Tensor) -> Tensor:
        """What the butterfly, the distances or the rows keep, of blocks ``row`` ``[n, 1]`` and ``column`` ``[m]``."""
        if self.distances is not None:
            return torch.isin(row - column, torch.tensor(self.distances, device=row.device))
        if self.rows is not None:
            wanted = [set(self.rows[index]) for index in self._known(row)]
            known = [[index in mine for index in column.tolist()] for mine in wanted]
            return torch.tensor(known, device=row.device)
        stride = row ^ column
        kept = is_power_of_two(stride)
        return kept if self.max_stride is None else kept & (stride <= self.max_stride)

    def _known(self, row: Tensor) -> list[int]:
        indices: list[int] = row.flatten().tolist()
        if self.rows is not None and indices[-1] >= len(self.rows):
            raise fail("block_sparse", "rows", f"be for the {indices[-1] + 1} blocks of the text", len(self.rows))
        return indices
