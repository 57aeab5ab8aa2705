"""S2-Attention: every head sees its own share of the far context, and the heads together see all of it.

Paper: Lin et al. 2024, https://arxiv.org/abs/2407.17678. A block of queries at index ``q`` sees the block of
keys ``k`` if ``q - k < local_blocks``, or if ``(k + shard) % vert_stride == 0``, where the shard is that of the head.
Strides lie at places of the text, not at distances: a far block is seen by the same heads from everywhere after it.

The union over heads is the whole context as long as there are at least ``vert_stride`` shards, which is checked when
the policy is put on a model. The authors' DKernel spaces fewer shards than that by ``vert_stride / heads``, which
leaves blocks that no head sees; here that is refused.

Grouped queries: DKernel gives all heads of a key-value head one shard when it is told how many of these there are, so
that the cache of each holds that share alone, and otherwise one to each head. Here the cache stays whole, so one to
each head is the default; ``heads_per_shard`` set to the queries of a key-value head is the other. Not here: the cache
that drops the rest, dense heads among the others (`per_head` does that) and training; the paper's first layers
stay dense (``layers``).
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..checks import fail
from ..ops.formats.block import BlockMask
from ..ops.patterns import is_strided, text_blocks, text_mask
from .policy import PrefillPolicy
from .prompt import Prompt


class Sharded(PrefillPolicy):
    """Options of ``sharded``.

    Attributes:
        local_blocks: nearest blocks that a block of queries sees, its own included.
        vert_stride: of so many blocks farther away a head sees one.
        heads_per_shard: heads in succession that share a shard.
        homogeneous: every head has the shard of the first, as the paper's control; then most of the context is lost.
        offset: added to the index of the shard: which one the first head has.
        q_block: tokens in a block, of queries and of keys alike.
    """

    local_blocks: int = Field(32, ge=1)
    vert_stride: int = Field(8, ge=1)
    heads_per_shard: int = Field(1, ge=1)
    homogeneous: bool = False
    offset: int = Field(0, ge=0)
    q_block: int = Field(64, ge=1)

    def check_model(self, layers: Sequence[int], num_heads: int, num_kv_heads: int) -> None:
        """Raise InputError unless the heads have enough shards for the whole context (or are ``homogeneous``)."""
        shards = -(-num_heads // self.heads_per_shard)
        if self.vert_stride > shards and not self.homogeneous:
            wanted = f"be at most {shards}, the shards that {num_heads} heads have"
            raise fail("sharded", "vert_stride", wanted, self.vert_stride)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> BlockMask:
        """The pattern of each head by its index in the layer; ``query`` and ``key`` are not looked at."""
        num_queries, num_keys = query.shape[2], key.shape[2]
        row, column = text_blocks(num_queries, num_keys, self.q_block, dropped=prompt.dropped, device=query.device)
        heads = (0,) if self.homogeneous else prompt.head_indices(query)
        shard = torch.tensor(heads, device=query.device)[:, None, None] // self.heads_per_shard + self.offset
        kept = is_strided(column, self.vert_stride, shard) | (row - column < self.local_blocks)
        return text_mask(
            kept, num_queries, num_keys, block_size=self.q_block, dropped=prompt.dropped, window=prompt.window
        )

    def lookahead(self, length: int) -> int:
        """1: the pattern is fixed."""
        return 1
