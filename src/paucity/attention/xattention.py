"""XAttention: sums along antidiagonals tell which blocks matter.

Paper: Xu et al. 2025, https://arxiv.org/abs/2503.16428, Sec. 2 and Algorithm 1. Queries and keys are taken in groups of
``stride`` tokens. The score of a pair of groups is the sum along the antidiagonal of its tile,
``A(I, J) = sum_s q_{I, stride - 1 - s} . k_{J, s} / (sqrt(d) stride)``, which every column and every diagonal crosses.
After a softmax over the groups that a group of queries sees, the sums over blocks say how much of a row each block of
keys holds; each row of blocks keeps the fewest that hold ``threshold`` of it.

As in the public code a group of queries sees the groups up to its own, and the first block and those of the row's own
positions always stay and count towards the threshold. In a group that is not whole the sum is divided by the queries
that are there, where that code divides by ``stride``. Not here: the dynamic programme that gives each head a threshold
of its own (`paucity.attention.per_head` takes such a result).
"""

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from ..checks import fail
from ..ops.blocks import (
    block_lengths,
    block_mask,
    cover_mask,
    diagonal_blocks,
    grouped_products,
    pool_blocks,
    soft_capped,
    visible_blocks,
)
from ..ops.formats.block import BlockMask
from .policy import PrefillPolicy
from .prompt import Prompt

_ROWS = 256
"""Groups of queries whose scores are held at once."""


class XAttention(PrefillPolicy):
    """Options of ``xattention``.

    Attributes:
        threshold: share of the estimated attention that a row of blocks keeps.
        stride: tokens in a group, 8 or 16 in the paper; the estimate costs about ``1 / (2 stride)`` of dense attention.
        k_block: keys in a block.
        force_first: whether the first block of the text always stays.
    """

    threshold: float = Field(0.9, gt=0, le=1)
    stride: int = Field(8, ge=1)
    k_block: int = Field(128, ge=1)
    force_first: bool = True

    @model_validator(mode="after")
    def _whole(self) -> "XAttention":
        for name in ("q_block", "k_block"):
            if getattr(self, name) % self.stride:
                raise fail("xattention", name, f"be a multiple of stride ({self.stride})", getattr(self, name))
        return self

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> BlockMask:
        """The choice of every row of blocks, of whole blocks."""
        queries, keys = query.shape[2], key.shape[2]
        sizes = (queries, keys, self.q_block, self.k_block)
        seen = visible_blocks(*sizes, window=prompt.window, device=query.device)
        forced = diagonal_blocks(*sizes, device=query.device)
        if self.force_first and not prompt.dropped:
            forced[:, 0] = True
        mass = antidiagonal_mass(
            query, key, prompt, stride=self.stride, q_block=self.q_block, k_block=self.k_block
        ).masked_fill(~seen, 0.0)
        kept = cover_mask(mass, self.threshold, forced=forced & seen) & seen
        return block_mask(kept, queries, keys, q_block=self.q_block, k_block=self.k_block)

    def lookahead(self, length: int) -> int:
        """The block of queries: a row looks at its own queries, and at keys up to its end."""
        return self.q_block


def antidiagonal_mass(query: Tensor, key: Tensor, prompt: Prompt, *, stride: int, q_block: int, k_block: int) -> Tensor:
    """Estimated attention of rows of blocks to blocks of keys, float32 ``[B, H, n, m]``; a group adds 1 to its row.

    Args:
        query: ``[B, H, Tq, D]``, the last ``Tq`` tokens.
        key: ``[B, H_kv, Tk, D]``.
        prompt: scale, softcap and window.
        stride: tokens in a group.
        q_block: queries in a block, a multiple of ``stride``.
        k_block: keys in a block, a multiple of ``stride``.
    """
    (batch, heads, queries, dim), keys = query.shape, key.shape[2]
    stride = min(stride, keys)  # a longer group is the same group
    start, num_groups = keys - queries, -(-keys // stride)
    first, rest = start // stride, num_groups * stride - keys
    tiles = pad(query.detach(), (0, 0, start % stride, rest)).reshape(batch, heads, -1, stride, dim)
    # A power of two is exact, and sums of unscaled products leave the range of float16.
    shrink = 2.0 ** -math.ceil(math.log2(stride * dim**0.5)) if query.dtype == torch.float16 else 1.0
    grouped_query = tiles.flip(3).flatten(3) * shrink
    grouped_key = pad(key.detach(), (0, 0, 0, rest)).reshape(batch, key.shape[1], num_groups, stride * dim)
    factor = prompt.scale / shrink / block_lengths(queries, stride, start=start, device=query.device)
    group = torch.arange(num_groups, device=query.device)
    per_row, per_block = (min(block // stride, num_groups) for block in (q_block, k_block))
    step = max(1, _ROWS // per_row) * per_row
    sums = []
    # Some rows of blocks at a time, with the keys up to their end: memory is bounded, and later keys cost nothing.
    for begin in range(first // per_row * per_row, num_groups, step):
        low, high = max(begin, first), min(begin + step, num_groups)
        logits = grouped_products(grouped_query[:, :, low - first : high - first], grouped_key[:, :, :high]).float()
        logits *= factor[low - first : high - first].unsqueeze(-1)
        logits = soft_capped(logits, prompt.softcap)
        mine, theirs = group[low:high].unsqueeze(-1), group[:high]
        hidden = theirs > mine
        if prompt.window is not None:
            hidden |= (theirs + 1) * stride <= mine * stride - prompt.window + 1
        prob = pad(logits.masked_fill_(hidden, -torch.inf).softmax(-1), (0, -high % per_block))
        by_block = prob.reshape(*prob.shape[:-1], -1, per_block).sum(-1)
        by_row = pool_blocks(by_block, per_row, start=low, reduce="sum")
        sums.append(pad(by_row, (0, -(-keys // k_block) - by_row.shape[-1])))
    return torch.cat(sums, dim=2)
