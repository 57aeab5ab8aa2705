"""Block top-k: every block of queries keeps the blocks of keys whose mean looks most like its own mean.

Paper: Jiang et al. 2024 (MInference), https://arxiv.org/abs/2407.02490, Sec. 3.2, "Block-Sparse head", Algorithm 3:
``score(I, J) = mean_{i in I}(q_i) . mean_{j in J}(k_j) / sqrt(d)``, the ``num_blocks`` highest of each row stay.

The blocks that hold a row's own positions always stay, and on demand the first block of the text; both are part of
the budget. (The paper forces none; a query that does not see itself has no meaning in a language model.) A row keeps
exactly ``min(num_blocks, blocks it sees)`` blocks. The rank is that of the products: neither softmax nor soft cap
changes it. Not here: the paper's other head types (`paucity.attention.vertical_slash`,
`paucity.attention.sink_window`) and the search that gives each head its own.
"""

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..checks import fail
from ..ops.blocks import block_mask, diagonal_blocks, grouped_products, pool_blocks, visible_blocks
from ..ops.formats.block import BlockMask
from ..ops.select import num_kept, topk_mask
from .policy import PrefillPolicy
from .prompt import Prompt


class BlockTopK(PrefillPolicy):
    """Options of ``block_topk``. The budget is per row of blocks and head; forced blocks are part of it.

    Attributes:
        num_blocks: blocks of keys that a block of queries keeps.
        block_share: those kept as a share of the text's blocks of keys, instead of ``num_blocks``.
        k_block: keys in a block.
        force_first: whether the first block of the text always stays.
    """

    q_block: int = Field(64, ge=1)
    k_block: int = Field(64, ge=1)
    num_blocks: int = Field(100, ge=1)
    block_share: float | None = Field(None, gt=0, le=1)
    force_first: bool = False

    @model_validator(mode="after")
    def _room(self) -> "BlockTopK":
        if self.block_share is None and self.num_blocks < self._num_forced():
            wanted = f"be at least {self._num_forced()}, the blocks that always stay"
            raise fail("block_topk", "num_blocks", wanted, self.num_blocks)
        return self

    def budget(self, length: int) -> int:
        """Blocks that a row keeps of a text of ``length`` tokens, where it sees as many; never less than are forced."""
        blocks = -(-length // self.k_block)
        wanted = self.num_blocks if self.block_share is None else num_kept(blocks, 1 - self.block_share)
        return min(max(wanted, self._num_forced()), blocks)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> BlockMask:
        """The choice of every row of blocks, of whole blocks."""
        queries, keys = query.shape[2], key.shape[2]
        sizes = (queries, keys, self.q_block, self.k_block)
        seen = visible_blocks(*sizes, window=prompt.window, device=query.device)
        forced = diagonal_blocks(*sizes, device=query.device)
        if self.force_first and not prompt.dropped:
            forced[:, 0] = True
        pooled = pool_blocks(query.detach(), self.q_block, start=keys - queries)
        score = grouped_products(pooled, pool_blocks(key.detach(), self.k_block)) * prompt.scale
        score = score.masked_fill(forced, torch.inf).masked_fill(~seen, -torch.inf)
        kept = topk_mask(score, k=self.budget(keys)) & seen
        return block_mask(kept, queries, keys, q_block=self.q_block, k_block=self.k_block)

    def lookahead(self, length: int) -> int:
        """Where blocks of queries and of keys begin together: a row looks at its own blocks as a whole."""
        return math.lcm(self.q_block, self.k_block)

    def _num_forced(self) -> int:
        own = 1 - (math.gcd(self.q_block, self.k_block) - self.q_block) // self.k_block
        return own + self.force_first
