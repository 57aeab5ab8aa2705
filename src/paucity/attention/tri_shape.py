"""Tri-shape: sinks, a window, and the last queries dense.

Paper: Li et al. 2024 (SCBench), https://arxiv.org/abs/2412.10319: the A-shape of sinks and window, with a dense bottom:
the last ``num_last`` queries, which ask about the text, see all of it. The sizes are the defaults of the authors' code.

All three sizes count tokens exactly. The last queries are those at the end of what is given, so that a prompt given in
parts has a dense end in each of them, and what a token sees depends on how many come after it.
Not here: masks that differ by layer (TriangleMix starts the pattern at a later layer; ``layers`` does that).
"""

import torch
from pydantic import Field
from torch import Tensor

from ..ops.blocks import visible_blocks
from ..ops.formats.block import BlockMask
from .policy import PrefillPolicy
from .prompt import Prompt


class TriShape(PrefillPolicy):
    """Options of ``tri_shape``.

    Attributes:
        num_sinks: keys at the start that every query sees.
        window_size: latest keys that a query sees, itself included.
        num_last: queries at the end of the text that see everything.
    """

    num_sinks: int = Field(128, ge=0)
    window_size: int = Field(3968, ge=1)
    num_last: int = Field(100, ge=1)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> BlockMask:
        """The same pattern for every head; ``query`` and ``key`` are not looked at."""
        num_queries, num_keys = query.shape[2], key.shape[2]
        size = min(self.q_block, max(1, num_keys))  # a longer block is the same block
        seen = visible_blocks(num_queries, num_keys, size, size, window=prompt.window, device=query.device)
        inside = torch.arange(size, device=query.device)
        first = (num_keys - num_queries) // size * size
        row = torch.arange(first, num_keys, size, device=query.device).unsqueeze(-1)
        column = torch.arange(0, num_keys, size, device=query.device)
        last_row, last_column = ((x + size - 1).clamp(max=num_keys - 1) for x in (row, column))

        def keeps(distance: Tensor, column: Tensor, row: Tensor) -> Tensor:
            near = (distance < self.window_size) | (column < self.num_sinks - prompt.dropped)
            return near | (row >= num_keys - self.num_last)

        some = seen & keeps(row - last_column, column, last_row)
        every = keeps(last_row - column, last_column, row)
        cut = some & ~every
        i, j = cut.nonzero(as_tuple=True)
        at, to = row[i] + inside, column[j].unsqueeze(-1) + inside
        elements = keeps(at.unsqueeze(-1) - to.unsqueeze(-2), to.unsqueeze(-2), at.unsqueeze(-1))
        number = torch.where(cut, cut.flatten().cumsum(0).view_as(cut) - 1, -1).int()
        q_len = num_queries + (num_keys - num_queries) % size
        return BlockMask(some[None, None], size, size, q_len, num_keys, number[None, None], elements)

    def lookahead(self, length: int) -> int:
        """``length``: which queries are the last is known at its end."""
        return length
