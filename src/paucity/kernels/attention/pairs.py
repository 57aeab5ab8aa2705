"""Pairs of a query and a key that attention computes: how many, and which."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.formats.block import BlockMask
from ...ops.formats.pairs import element_counts
from ...ops.formats.stripes import KeyLists, Window
from .problem import Problem


def kept_pairs(query: Tensor, key: Tensor, problem: Problem) -> float:
    """Pairs of a query and a key that it sees, of all heads and the whole batch; padded queries not counted."""
    (batch, heads, queries, _), keys, pattern = query.shape, key.shape[2], problem.pattern
    padding, window = problem.padding, problem.window
    if isinstance(pattern, BlockMask):
        kept = pattern.kept_pairs(queries, keys, padding=padding, window=window, causal=problem.causal)
    elif isinstance(pattern, Window) or problem.causal:
        kept = pattern.kept_pairs(queries, keys, padding=padding, window=window)
    else:
        kept = _kept_of_lists(pattern, queries, keys, padding)
    return float(kept.sum()) * (batch // kept.shape[0]) * (heads // kept.shape[1])


def keeps_everything(query: Tensor, key: Tensor, problem: Problem) -> bool:
    """Whether the pattern, blocks or lists, leaves out nothing that a query may see; False with padding or a window."""
    pattern, queries, keys = problem.pattern, query.shape[2], key.shape[2]
    if isinstance(pattern, Window) or problem.padding is not None or problem.window is not None:
        return False
    sizes = (queries, keys, pattern.q_block, pattern.k_block if isinstance(pattern, BlockMask) else keys)
    counts = element_counts(*sizes, causal=problem.causal, device=query.device)
    if isinstance(pattern, BlockMask):
        possible = bool((pattern.blocks | (counts == 0)).all())
    else:
        last = torch.arange(1, counts.shape[0] + 1, device=query.device) * pattern.q_block + keys - queries
        needed = last.clamp(max=keys) if problem.causal else torch.full_like(last, keys)
        possible = bool((pattern.counts >= needed).all())
    return possible and kept_pairs(query, key, problem) == float(counts.sum()) * query.shape[0] * query.shape[1]


def visible(problem: Problem, queries: int, keys: int, first: int, last: int) -> Tensor:
    """What queries ``first`` to ``last`` see, bool ``[B or 1, h, last - first, Tk]``; a block begins at ``first``."""
    pattern, padding, rows = problem.pattern, problem.padding, last - first
    if not isinstance(pattern, Window):
        device = (pattern.blocks if isinstance(pattern, BlockMask) else pattern.positions).device
    else:
        device = torch.device("cpu") if padding is None else padding.device
    at = torch.arange(keys, device=device)
    query_at = torch.arange(keys - queries + first, keys - queries + last, device=device).unsqueeze(-1)
    near = at <= query_at if problem.causal else torch.ones(rows, keys, dtype=torch.bool, device=device)
    if problem.window is not None:
        near = near & (at > query_at - problem.window)
    if isinstance(pattern, Window):
        sinks = pattern.sink_mask(keys, padding)[:, None, None].to(device)
        kept = near & ((at > query_at - pattern.window_size) | sinks)
        return kept if padding is None else kept & padding[:, None, None]
    blocks = slice(first // pattern.q_block, -(-last // pattern.q_block))
    if isinstance(pattern, KeyLists):
        positions = pattern.positions[:, :, blocks].long()
        kept = torch.zeros((*positions.shape[:3], keys + 1), dtype=torch.bool, device=device)
        kept = kept.scatter_(-1, positions % (keys + 1), True)[..., :keys]
    elif pattern.partial is None:
        kept = pattern.blocks[:, :, blocks].repeat_interleave(min(pattern.k_block, keys), -1)[..., :keys]
    else:
        part = (pattern.q_block, pattern.k_block, rows, keys, pattern.partial[:, :, blocks], pattern.elements)
        kept = BlockMask(pattern.blocks[:, :, blocks], *part).to_dense() & near
        return kept if padding is None else kept & padding[:, None, None]
    # A whole block of queries keeps the same: one pass over the mask that comes out.
    kept = kept if padding is None else kept & padding[:, None, None]
    block = min(pattern.q_block, max(1, rows))
    near = F.pad(near, (0, 0, 0, -rows % block)).view(-1, block, keys)
    return (kept.unsqueeze(3) & near).flatten(2, 3)[:, :, :rows]


def _kept_of_lists(lists: KeyLists, queries: int, keys: int, padding: Tensor | None) -> Tensor:
    """Pairs ``[B, H]`` of lists that are not causal."""
    starts = torch.arange(0, queries, lists.q_block, device=lists.positions.device)
    if padding is None:
        return (lists.counts * (queries - starts).clamp(max=lists.q_block)).sum(-1)
    batch = max(len(padding), len(lists.positions))
    at = lists.positions.expand(batch, -1, -1, -1)
    real = padding.expand(batch, -1)
    used = real.gather(1, at.clamp(min=0).long().flatten(1)).view(at.shape) & (at >= 0)
    rows = F.pad(real[:, keys - queries :], (0, len(starts) * lists.q_block - queries))
    return (used.sum(-1) * rows.view(batch, 1, len(starts), -1).sum(-1)).sum(-1)
