"""Vertical-slash: the last queries tell which keys all queries look at, and which distances every query looks back.

Paper: Jiang et al. 2024 (MInference), https://arxiv.org/abs/2407.02490, Sec. 3.2 and Algorithm 1.

Softmax attention of the last 64 queries is summed down its columns (a *vertical*: one key for all queries) and along
its diagonals (a *slash*: one distance for all queries); the largest sums stay, separately for every head.

Granularity: a vertical is a single key. A slash is cut into tiles, as in the paper: for the block of queries
``[s, s + q_block)`` the distance ``d`` keeps the keys ``[s - d, s - d + q_block)`` for all queries of the block, so
that a block pays at most ``q_block`` keys for a slash, and near ones overlap. Keys that both keep count once.

The choice rests on the last queries, so an earlier token's output depends on later tokens, as in the paper; what a
query sees is never later than itself. Not here: the paper's other two head types (A-shape is
`paucity.attention.sink_window`, block-sparse is missing) and the offline search that gives each head its type and
budget; all heads have the same budget.
"""

import torch
from pydantic import Field
from torch import Tensor

from ..ops.formats.stripes import KeyLists, causal_mask
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
        vertical_score, slash_score = line_scores(query, key, prompt, num_last=self.num_last_queries)
        vertical, slash = self.lines(vertical_score, slash_score)
        return line_pattern(vertical, slash, num_queries=query.shape[2], q_block=self.q_block)

    def lines(self, vertical_score: Tensor, slash_score: Tensor) -> tuple[Tensor, Tensor]:
        """Kept columns and kept distances, bool ``[B, H, Tk]`` each, `budgets` of them."""
        keys = vertical_score.shape[-1]
        place = torch.arange(keys, device=vertical_score.device)
        num_vertical, num_slash = self.budgets(keys)
        vertical_score = vertical_score.masked_fill(place < self.forced_vertical, torch.inf)
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
    batch, heads, _, dim = query.shape
    group_heads, keys = key.shape[1:3]
    last = query.detach()[:, :, -num_last:] * prompt.scale
    rows = last.shape[2]
    logits = (last.reshape(batch, group_heads, -1, dim) @ key.detach().mT).float().view(batch, heads, rows, keys)
    if prompt.softcap is not None:
        logits = torch.tanh(logits / prompt.softcap) * prompt.softcap
    seen = causal_mask(rows, keys, window=prompt.window, device=key.device)
    prob = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    # In the mirrored row r, distance d is at d + rows - 1 - r: read in rows shorter by one, each is in one column.
    mirrored = torch.nn.functional.pad(prob.flip(-1), (0, rows))
    flat = mirrored.flatten(-2)[..., rows - 1 : rows - 1 + rows * (keys + rows - 1)]
    return prob.sum(-2), flat.view(batch, heads, rows, -1)[..., :keys].sum(-2)


def line_pattern(vertical: Tensor, slash: Tensor, *, num_queries: int, q_block: int) -> KeyLists:
    """The key lists of kept columns and distances.

    Args:
        vertical: ``[B, H, Tk]`` bool by position.
        slash: ``[B, H, Tk]`` bool by distance.
        num_queries: the last tokens are queries.
        q_block: queries in a block.
    """
    keys, device = vertical.shape[-1], vertical.device
    first = keys - num_queries
    start = torch.arange(first - first % q_block, keys, q_block, device=device)
    # Key j is in the tile of distance d if start - j <= d < start - j + q_block. That depends on j - start alone:
    # covered says it for j - start from -keys on, and every block reads its part of it, the last block first.
    before = torch.nn.functional.pad(slash.cumsum(-1, dtype=torch.int32), (q_block, 0))
    before = torch.cat([before, before[..., -1:].expand(*before.shape[:-1], q_block)], dim=-1)
    covered = (before[..., q_block:] > before[..., :-q_block]).flip(-1)
    covered = torch.nn.functional.pad(covered, (0, keys))[..., keys - int(start[-1]) :]
    kept = covered.unfold(-1, keys, q_block)[..., : len(start), :].flip(-2)
    kept |= vertical.unsqueeze(-2) & (torch.arange(keys, device=device) < (start + q_block).unsqueeze(-1))
    return KeyLists.from_mask(kept, q_block=q_block)
