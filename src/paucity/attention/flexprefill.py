"""FlexPrefill: every head looks at the prompt, picks one of two patterns, and as many blocks as hold its attention.

Paper: Lai et al. 2025, https://arxiv.org/abs/2502.20766, Algorithms 1 to 4. The last ``q_block`` queries are a sample.

- Pattern (Alg. 2): the sampled attention, summed over blocks of keys, is compared with the estimate from means,
  ``softmax(mean(q) . mean(k_J) / sqrt(d))``. Where the root of their Jensen-Shannon divergence is below ``tau``, means
  can be trusted and the head is *query-aware*; else it is *vertical-slash*.
- Vertical-slash (Alg. 3): the fewest columns that hold ``gamma`` of the sampled attention, and the fewest diagonals
  that do, for all queries.
- Query-aware (Alg. 4): ``softmax(mean(q_I) . mean(k_J) / sqrt(d))`` for all pairs of blocks; over the whole head the
  fewest blocks that hold ``gamma`` of it.

Columns and diagonals are those of blocks, as in the paper's kernels: of the mass of diagonal ``d = D b + r`` (``b``
keys in a block) ``(b - r) / b`` lies in block diagonal ``D`` and ``r / b`` in ``D + 1``. The public code turns a number
of single columns into a number of blocks, and stops a block short of ``gamma``; here what is kept reaches it. As in
that code, the first block column, the main block diagonal and ``min_budget`` are a floor under both patterns. Not here:
its upper bound on the budget.

The choice rests on the last queries, so an earlier token's output depends on later tokens, as in the paper.
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from ..ops.blocks import block_mask, cover_mask, grouped_products, pool_blocks, soft_capped, visible_blocks
from ..ops.formats.block import BlockMask
from ..ops.select import topk_mask
from .policy import PrefillPolicy
from .prompt import Prompt
from .vertical_slash import line_scores


class FlexPrefill(PrefillPolicy):
    """Options of ``flexprefill``. Blocks of keys are of the size of blocks of queries, ``q_block``.

    Attributes:
        gamma: share of the estimated attention that a head keeps; 0.9 and 0.95 in the paper.
        tau: a head whose estimate from means is nearer than this is query-aware; with 0 none is.
        min_budget: keys in the block columns that a head keeps at least, and in a row of its block diagonals.
    """

    gamma: float = Field(0.9, gt=0, le=1)
    tau: float = Field(0.1, ge=0, le=1)
    min_budget: int = Field(1024, ge=1)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> BlockMask:
        """The choice of every head of every text, of whole blocks."""
        size, queries, keys = self.q_block, query.shape[2], key.shape[2]
        rows = min(size, queries)
        by_key, by_distance = (total / rows for total in line_scores(query, key, prompt, num_last=rows))
        column = pool_blocks(by_key.unsqueeze(-1), size, reduce="sum").squeeze(-1)
        columns, diagonals = self.lines(column, diagonal_mass(by_distance, size), dropped=prompt.dropped)
        kept = line_blocks(columns, diagonals, -(-keys // size) - (keys - queries) // size)
        means = pool_blocks(key.detach(), size)
        sample = query.detach()[:, :, -rows:].float().mean(2, keepdim=True)
        sampled = visible_blocks(rows, keys, 1, size, window=prompt.window, device=query.device).any(0)
        aware = root_divergence(_block_prob(sample, means, sampled, prompt).squeeze(2), column) < self.tau
        seen = visible_blocks(queries, keys, size, size, window=prompt.window, device=query.device)
        if aware.any():  # the means of all queries are read only then
            prob = _block_prob(pool_blocks(query.detach(), size, start=keys - queries), means, seen, prompt)
            best = cover_mask(prob.flatten(2), self.gamma).view_as(prob)
            columns, diagonals = self.lines(
                column, diagonal_mass(by_distance, size), dropped=prompt.dropped, floor=True
            )
            best |= line_blocks(columns, diagonals, best.shape[2])
            kept = torch.where(aware[..., None, None], best, kept)
        return block_mask(kept & seen, queries, keys, q_block=size, k_block=size)

    def lines(
        self, column: Tensor, diagonal: Tensor, *, dropped: int = 0, floor: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Block columns and block diagonals that stay, bool, from the mass of each, ``[B, H, n]``.

        Args:
            column: by place; the first stays unless the text's start was ``dropped``.
            diagonal: by distance in blocks; the first stays.
            dropped: keys of the text's start that are not there.
            floor: give only those that stay whatever ``gamma`` is.
        """
        first = torch.arange(column.shape[-1], device=column.device) == 0
        least = min(-(-self.min_budget // self.q_block), column.shape[-1])
        kept = []
        for mass, forced in ((column, first & (dropped == 0)), (diagonal, first)):
            lines = topk_mask(mass.masked_fill(forced, torch.inf), k=least)
            kept.append(lines if floor else lines | cover_mask(mass, self.gamma, forced=forced))
        return kept[0], kept[1]


def diagonal_mass(by_distance: Tensor, size: int) -> Tensor:
    """Mass of block diagonals ``[..., n]`` from that of single distances ``[..., T]``, in blocks of ``size``.

    Distance ``D * size + r`` gives ``(size - r) / size`` of its mass to ``D`` and the rest to ``D + 1``: so much of a
    diagonal lies there.
    """
    away = torch.arange(by_distance.shape[-1], device=by_distance.device) % size / size
    near, far = (
        pool_blocks((by_distance * part).unsqueeze(-1), size, reduce="sum").squeeze(-1) for part in (1 - away, away)
    )
    return near + pad(far, (1, 0))[..., :-1]


def line_blocks(columns: Tensor, diagonals: Tensor, num_rows: int) -> Tensor:
    """Blocks on kept block columns or diagonals: bool ``[B, H, num_rows, n]``, for the last ``num_rows`` of ``n`` rows.

    Args:
        columns: ``[B, H, n]`` bool, by place.
        diagonals: ``[B, H, n]`` bool, by distance.
        num_rows: blocks of queries.
    """
    place = torch.arange(columns.shape[-1], device=columns.device)
    distance = place[len(place) - num_rows :].unsqueeze(-1) - place
    return columns.unsqueeze(-2) | (diagonals[..., distance.clamp(min=0)] & (distance >= 0))


def root_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence, in nats, of distributions along the last dimension."""
    middle = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny)
    total = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(-1) / 2
    return total.clamp(min=0).sqrt()


def _block_prob(query: Tensor, key: Tensor, seen: Tensor, prompt: Prompt) -> Tensor:
    """Softmax of the products of means, over the blocks that are ``seen``: ``[B, H, n, m]``."""
    logits = soft_capped(grouped_products(query.to(key.dtype), key) * prompt.scale, prompt.softcap)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1)
