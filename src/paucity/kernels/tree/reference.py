"""The tree search in PyTorch, all heads and many blocks of queries at once; the definition of the result."""

import torch
from torch import Tensor

from ...ops.select import topk_mask
from . import spans as shared

BOUND = 1 << 24
"""Numbers that the keys gathered at a time may have."""


def tree_select(
    query: Tensor,
    key: Tensor,
    segments: int,
    k_block: int,
    q_block: int,
    query_stride: int,
    num_sinks: int,
    window_size: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Positions ``[B, H, blocks, width]`` int32 and counts ``[B, H, blocks]`` int64, as `KeyLists` has them.

    Args:
        query: ``[B, H, Tq, D]``.
        key: ``[B, H_kv, Tk, D]``.
        segments: key blocks that the search keeps.
        k_block: keys in one.
        q_block: queries in a block.
        query_stride: of a block each ``query_stride``-th query scores.
        num_sinks: first keys of the text that stay.
        window_size: latest keys of a query that stay.
        window: the model's, 0 for none.
    """
    batch, heads, queries, dim = query.shape
    keys, device = key.shape[2], query.device
    span = shared.spans(queries, keys, q_block, num_sinks, window_size, window).to(device)
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(wide), key.to(wide)
    step = max(1, BOUND // max(1, 2 * segments * k_block * dim * batch * heads))
    parts = []
    for some in torch.split(span, step):
        found = _search(query, key, some, segments, k_block, q_block, query_stride, window)
        parts.append(_lists(found, some, num_sinks, window_size + q_block - 1))
    positions = torch.cat(parts, dim=2)
    width = shared.width(keys, segments, k_block, q_block, num_sinks, window_size)
    return positions[..., -width:].int().contiguous(), (positions >= 0).sum(-1)


def _lists(found: Tensor, span: Tensor, num_sinks: int, most_near: int) -> Tensor:
    """The keys found, and those seen in any case, ascending with -1 in front: ``[B, H, n, any]``."""
    _, stop, oldest, far, near = (column.unsqueeze(-1) for column in span.unbind(-1))
    device = found.device
    sinks, latest = (torch.arange(count, device=device) for count in (num_sinks, most_near))
    ends = [torch.where(at < end, at, -1) for at, end in ((oldest + sinks, far), (near + latest, stop))]
    fixed = torch.cat(ends, dim=-1).expand(*found.shape[:3], -1)
    return torch.cat([found, fixed], dim=-1).sort(dim=-1).values


def _search(
    query: Tensor, key: Tensor, span: Tensor, segments: int, k_block: int, q_block: int, stride: int, window: int
) -> Tensor:
    """The keys ``[B, H, n, segments * k_block]`` that the search finds for ``n`` blocks, -1 where there are less."""
    batch, heads = query.shape[:2]
    first, stop, _, far, near = (column.unsqueeze(-1) for column in span.unbind(-1))
    blocks = -(-(near - far) // k_block)
    # Of a block that searches no more than stays, the segments are single key blocks, and some are empty.
    edges = torch.arange(segments + 1, device=span.device) * blocks.clamp(min=1) // segments
    edges = torch.where(blocks > segments, edges, torch.arange(segments + 1, device=span.device).clamp(max=blocks))
    start, size = (x.expand(batch, heads, -1, -1) for x in (edges[:, :-1], edges.diff(dim=-1)))
    if int(size.max()) > 1:
        scorers = stop - 1 - stride * torch.arange(-(-q_block // stride), device=span.device)
        scorers = torch.where(scorers < first, stop - 1, scorers)  # twice does not change the maximum
        sampled = query[:, :, scorers - (key.shape[2] - query.shape[2])]
        while int(size.max()) > 1:
            low = size // 2
            start = torch.stack([start, start + low], dim=-1).flatten(-2)
            size = torch.stack([low, size - low], dim=-1).flatten(-2)
            middle = far + (start + size // 2) * k_block
            places = middle.unsqueeze(-1) + torch.arange(k_block, device=span.device)
            places = torch.minimum(places, near.unsqueeze(-1) - 1).clamp(min=0)
            score = _score(sampled, scorers, key, places, window).masked_fill(size == 0, torch.nan)
            kept = topk_mask(score, k=segments)  # NaN comes last
            start, size = (x[kept].view(batch, heads, -1, segments) for x in (start, size))
    at = far.unsqueeze(-1) + (start * k_block).unsqueeze(-1) + torch.arange(k_block, device=span.device)
    return torch.where((size.unsqueeze(-1) > 0) & (at < near.unsqueeze(-1)), at, -1).flatten(-2)


def _score(sampled: Tensor, scorers: Tensor, key: Tensor, places: Tensor, window: int) -> Tensor:
    """The highest product of a query and a key of each block ``[B, H, n, m]``.

    Args:
        sampled: ``[B, H, n, s, D]`` queries.
        scorers: ``[n, s]`` their positions.
        key: ``[B, H_kv, Tk, D]``.
        places: ``[B, H, n, m, k_block]`` positions of the keys.
        window: the model's, 0 for none.
    """
    (batch, heads, n, _, dim), (_, kv_heads, keys, _) = sampled.shape, key.shape
    owner = torch.arange(batch * kv_heads, device=key.device).repeat_interleave(heads // kv_heads)
    rows = places.flatten(-2) + keys * owner.view(batch, heads, 1, 1)
    gathered = key.reshape(-1, dim)[rows]
    product = sampled @ gathered.mT
    if window:
        unseen = scorers.unsqueeze(-1) >= places.flatten(-2).unsqueeze(-2) + window
        product = product.masked_fill(unseen, -torch.inf)
    return product.amax(-2).view(batch, heads, n, -1, places.shape[-1]).amax(-1)
