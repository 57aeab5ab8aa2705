"""Vertical-slash: the last queries tell which keys all queries look at, and which distances every query looks back.

Paper: Jiang et al. 2024 (MInference), https://arxiv.org/abs/2407.02490, Sec. 3.2 and Algorithm 1.

Softmax attention of the last 64 queries is summed down its columns (a *vertical*: one key for all queries) and along
its diagonals (a *slash*: one distance for all queries); the largest sums stay, separately for every head.

Granularity: a vertical is a single key. A slash is cut into tiles, as in the paper: for the block of queries
``[s, s + q_block)`` the distance ``d`` keeps the keys ``[s - d, s - d + q_block)`` for all queries of the block, so
that a block pays at most ``q_block`` keys for a slash, and near ones overlap. Keys that both keep count once.

The choice rests on the last queries, so an earlier token's output depends on later tokens, as in the paper; what a
query sees is never later than itself. Memory is that of the lists and of the estimate, 64 rows of attention. The
paper's other two head types are `paucity.attention.sink_window` (A-shape) and `paucity.attention.block_topk`
(block-sparse); `paucity.attention.minference` finds offline which head gets which, and with what budget.
"""

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.lines import line_lists, line_mass
from ..ops.formats.stripes import KeyLists
from ..ops.select import num_kept, topk_mask
from .policy import PrefillPolicy
from .prompt import Prompt


class VerticalSlash(PrefillPolicy):
    """Options of ``vertical_slash``. Budgets are per head; forced lines are part of the budget.

    Attributes:
        num_vertical: columns kept.
        num_slash: diagonals kept.
        vertical_share: columns kept as a share of the text's length, instead of ``num_vertical``.
        slash_share: diagonals kept as a share of the text's length, instead of ``num_slash``.
        num_last_queries: queries at the end that the estimate uses.
        forced_vertical: first keys of the text that always stay.
        forced_slash: shortest distances that always stay.
    """

    min_length: int = Field(512, ge=0)
    num_vertical: int = Field(1000, ge=1)
    num_slash: int = Field(6096, ge=1)
    vertical_share: float | None = Field(None, gt=0, le=1)
    slash_share: float | None = Field(None, gt=0, le=1)
    num_last_queries: int = Field(64, ge=1)
    forced_vertical: int = Field(30, ge=0)
    forced_slash: int = Field(100, ge=0)

    def budgets(self, length: int) -> tuple[int, int]:
        """Verticals and slashes that a head keeps of a text of ``length`` tokens; at least one of each."""
        wanted = ((self.num_vertical, self.vertical_share), (self.num_slash, self.slash_share))
        counts = [count if share is None else num_kept(length, 1 - share) for count, share in wanted]
        return min(max(1, counts[0]), length), min(max(1, counts[1]), length)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> KeyLists:
        """The choice of every head, as key lists."""
        scores = line_scores(query, key, prompt, num_last=self.num_last_queries)
        return self.pattern(*scores, num_queries=query.shape[2], dropped=prompt.dropped)

    def pattern(self, vertical_score: Tensor, slash_score: Tensor, *, num_queries: int, dropped: int = 0) -> KeyLists:
        """The key lists for what `line_scores` gave, ``[B, H, Tk]`` each."""
        vertical, slash = self.lines(vertical_score, slash_score, dropped=dropped)
        return line_lists(vertical, slash, num_queries=num_queries, q_block=self.q_block)

    def lines(self, vertical_score: Tensor, slash_score: Tensor, *, dropped: int = 0) -> tuple[Tensor, Tensor]:
        """Kept columns and kept distances, bool ``[B, H, Tk]`` each, `budgets` of them.

        Args:
            vertical_score: mass by position.
            slash_score: mass by distance.
            dropped: keys of the text's start that are not there, and so are not forced.
        """
        keys = vertical_score.shape[-1]
        place = torch.arange(keys, device=vertical_score.device)
        num_vertical, num_slash = self.budgets(keys)
        vertical_score = vertical_score.masked_fill(place < self.forced_vertical - dropped, torch.inf)
        # A distance that the last queries do not have carries no mass.
        slash_score = slash_score.masked_fill(place < self.forced_slash, torch.inf)
        return topk_mask(vertical_score, k=num_vertical), topk_mask(slash_score, k=num_slash)


def line_scores(query: Tensor, key: Tensor, prompt: Prompt, *, num_last: int = 64) -> tuple[Tensor, Tensor]:
    """Attention mass of each column and each diagonal, over the last queries.

    Args:
        query: ``[B, H, Tq, D]``.
        key: ``[B, H_kv, Tk, D]``.
        prompt: scale, softcap and window of the layer.
        num_last: queries used, or all if there are fewer.

    Returns:
        By position ``[B, H, Tk]`` and by distance ``[B, H, Tk]``, float32, detached.
    """
    last = query.detach()[:, :, -num_last:]
    return line_mass(last, key.detach(), scale=prompt.scale, softcap=prompt.softcap, window=prompt.window)
