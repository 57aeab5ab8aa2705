"""Dense attention under a pattern's mask, for patterns that keep so much that tiles would lose to it."""

import torch
from torch import Tensor

from ...ops.formats.block import BlockMask
from ...ops.formats.stripes import KeyLists, Window
from .problem import Pattern, Problem

# Queries that SDPA takes at once: later keys are left out a chunk at a time, and the mask of a chunk stays small.
CHUNK = 1024
# From this share of the visible pairs on, SDPA with a mask was faster than the tiles (2 cores, 8192 tokens, D 64).
HALF_LIMIT, FULL_LIMIT = 0.6, 0.4


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
    return float(kept.sum()) * batch / kept.shape[0] * heads / kept.shape[1]


def faster(query: Tensor, key: Tensor, problem: Problem) -> str | None:
    """Why SDPA with the pattern as its mask is faster than tiles here, None where it is not or cannot do it."""
    if isinstance(problem.pattern, Window) or problem.softcap is not None or problem.bias is not None:
        return None
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    whole = Problem(Window(keys), 1.0, None, problem.padding, problem.window)
    visible = float(batch * heads * queries * keys)
    if problem.causal:
        visible = kept_pairs(query, key, whole)
    limit = HALF_LIMIT if query.dtype in (torch.bfloat16, torch.float16) else FULL_LIMIT
    if kept_pairs(query, key, problem) < limit * visible:
        return None
    return f"the pattern keeps more than {limit:.0%} of the pairs, and the native kernels are not there"


def num_pairs(query: Tensor, key: Tensor, problem: Problem) -> float:
    """Pairs that `attention` computes."""
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    step = _step(problem.pattern)
    pairs = sum(
        (min(first + step, queries) - first) * (min(keys, keys - queries + first + step) if problem.causal else keys)
        for first in range(0, queries, step)
    )
    return float(batch * heads * pairs)


def attention(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
    """What `reference.forward` returns as out, by SDPA in chunks of queries; no soft cap, no bias."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    outs = []
    for rows in torch.split(torch.arange(queries, device=query.device), _step(problem.pattern)):
        first, last = int(rows[0]), int(rows[-1]) + 1
        stop = keys - queries + last if problem.causal else keys
        seen = visible(problem, queries, keys, first, last)[..., :stop]
        if seen.shape[1] not in (1, heads):
            seen = seen.repeat_interleave(heads // seen.shape[1], dim=1)
        values = value[:, :, :stop]
        out = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, first:last], key[:, :, :stop], values, attn_mask=seen, scale=problem.scale, enable_gqa=True
        )
        empty = ~seen.any(-1, keepdim=True)
        outs.append(out.masked_fill(empty, 0.0) if empty.any() else out)
    return torch.cat(outs, dim=2)


def visible(problem: Problem, queries: int, keys: int, first: int, last: int) -> Tensor:
    """What queries ``first`` to ``last`` see, bool ``[B or 1, h, last - first, Tk]``; a block begins at ``first``."""
    pattern, padding = problem.pattern, problem.padding
    at = torch.arange(keys, device=_device(problem))
    query_at = torch.arange(keys - queries + first, keys - queries + last, device=at.device).unsqueeze(-1)
    if isinstance(pattern, Window):
        sinks = pattern.sink_mask(keys, padding)[:, None, None].to(at.device)
        kept = (at > query_at - pattern.window_size) | sinks
    elif isinstance(pattern, BlockMask):
        rows = slice(first // pattern.q_block, -(-last // pattern.q_block))
        partial = None if pattern.partial is None else pattern.partial[:, :, rows]
        part = (pattern.q_block, pattern.k_block, last - first, keys, partial, pattern.elements)
        kept = BlockMask(pattern.blocks[:, :, rows], *part).to_dense()
    else:
        positions = pattern.positions[:, :, first // pattern.q_block : -(-last // pattern.q_block)].long()
        kept = torch.zeros((*positions.shape[:3], keys + 1), dtype=torch.bool, device=positions.device)
        kept.scatter_(-1, positions % (keys + 1), True)
        kept = kept[..., :keys].repeat_interleave(pattern.q_block, dim=2)[:, :, : last - first]
    if problem.causal:
        kept = kept & (at <= query_at)
    if problem.window is not None:
        kept = kept & (at > query_at - problem.window)
    return kept if padding is None else kept & padding[:, None, None]


def _device(problem: Problem) -> torch.device | None:
    if isinstance(problem.pattern, Window):
        return None if problem.padding is None else problem.padding.device
    return (problem.pattern.blocks if isinstance(problem.pattern, BlockMask) else problem.pattern.positions).device


def _step(pattern: Pattern) -> int:
    """`CHUNK`, in whole blocks of queries."""
    return max(1, CHUNK // pattern.q_block) * pattern.q_block


def _kept_of_lists(lists: KeyLists, queries: int, keys: int, padding: Tensor | None) -> Tensor:
    """Pairs ``[B, H]`` of lists that are not causal."""
    starts = torch.arange(0, queries, lists.q_block, device=lists.positions.device)
    if padding is None:
        return (lists.counts * (queries - starts).clamp(max=lists.q_block)).sum(-1)
    batch = max(len(padding), len(lists.positions))
    at = lists.positions.expand(batch, -1, -1, -1)
    real = padding.expand(batch, -1)
    used = real.gather(1, at.clamp(min=0).long().flatten(1)).view(at.shape) & (at >= 0)
    rows = torch.nn.functional.pad(real[:, keys - queries :], (0, len(starts) * lists.q_block - queries))
    return (used.sum(-1) * rows.view(batch, 1, len(starts), -1).sum(-1)).sum(-1)
