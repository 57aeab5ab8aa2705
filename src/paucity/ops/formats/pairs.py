"""Pairs of a query and a key that a model may see, by block of queries and block of keys.

Positions are aligned at the end: query ``i`` stands at key position ``i + kv_len - q_len``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def element_counts(
    q_len: int, kv_len: int, q_block: int, k_block: int, *, causal: bool, device: torch.device
) -> Tensor:
    """Elements (causal ones, or all) in each block: int64 ``[nq, nk]``, without building them."""
    q_edges = torch.arange(0, q_len + q_block, q_block, device=device).clamp_(max=q_len)
    k_edges = torch.arange(0, kv_len + k_block, k_block, device=device).clamp_(max=kv_len)
    width = k_edges.diff()
    if not causal:
        return q_edges.diff()[:, None] * width
    # Query i sees clamp(i + 1 + kv_len - q_len - start, 0, width) keys of a block; summed over queries below each edge.
    seen = q_edges[:, None] + (kv_len - q_len) - k_edges[:-1]
    inside = seen.clamp(min=0).minimum(width)
    below = inside * (inside + 1) // 2 + (seen - width).clamp(min=0) * width
    return below.diff(dim=0)


def visible_counts(
    q_len: int,
    kv_len: int,
    q_block: int,
    k_block: int,
    *,
    padding: Tensor | None,
    window: int | None,
    causal: bool,
    device: torch.device,
) -> Tensor:
    """Pairs in each block of which neither is padding, the key within the window: int64 ``[B or 1, 1, nq, nk]``."""
    if padding is None and window is None:
        return element_counts(q_len, kv_len, q_block, k_block, causal=causal, device=device)[None, None]
    offset, key = kv_len - q_len, torch.arange(kv_len, device=device)
    first = torch.arange(0, q_len, q_block, device=device).unsqueeze(-1)
    last = (first + q_block).clamp(max=q_len).expand(-1, kv_len)
    if window is not None:
        last = torch.minimum(last, key + window - offset)
    first = torch.maximum(first, key - offset) if causal else first.expand(-1, kv_len)
    if padding is None:
        rows = (last - first).clamp(min=0).unsqueeze(0)
    else:
        # Queries that stand before the first key are no padding.
        real = F.pad(padding.long(), (max(-offset, 0), 0), value=1)[:, max(offset, 0) :]
        before = F.pad(real.cumsum(-1), (1, 0))
        rows = (before[:, last.clamp(min=0)] - before[:, first.clamp(max=q_len)]).clamp(min=0) * padding[:, None]
    blocks = -(-kv_len // k_block)
    return F.pad(rows, (0, blocks * k_block - kv_len)).view(*rows.shape[:2], blocks, k_block).sum(-1).unsqueeze(1)


def visible_elements(
    batch: Tensor,
    row: Tensor,
    column: Tensor,
    q_len: int,
    kv_len: int,
    q_block: int,
    k_block: int,
    *,
    padding: Tensor | None,
    window: int | None,
    causal: bool,
) -> Tensor:
    """The pairs that `visible_counts` counts of single blocks: bool ``[n, q_block, k_block]``.

    Args:
        batch: ``[n]``, which rows of ``padding``.
        row: ``[n]``, blocks of queries.
        column: ``[n]``, blocks of keys.
        q_len: queries.
        kv_len: keys.
        q_block: queries in a block.
        k_block: keys in a block.
        padding: ``[B or 1, kv_len]`` bool.
        window: keys visible to a query, itself included.
        causal: whether later keys are hidden.
    """
    query = (row * q_block).unsqueeze(-1) + torch.arange(q_block, device=row.device)
    key = (column * k_block).unsqueeze(-1) + torch.arange(k_block, device=row.device)
    at = query + kv_len - q_len
    seen = (query < q_len).unsqueeze(2) & (key < kv_len).unsqueeze(1)
    if causal:
        seen &= key.unsqueeze(1) <= at.unsqueeze(2)
    if window is not None:
        seen &= key.unsqueeze(1) > at.unsqueeze(2) - window
    if padding is not None:
        real = F.pad(padding, (max(q_len - kv_len, 0), 0), value=True)
        before = real.shape[1] - kv_len
        real = real[batch if len(real) > 1 else torch.zeros_like(batch)]
        seen &= real.gather(1, (key + before).clamp(max=real.shape[1] - 1)).unsqueeze(1)
        seen &= real.gather(1, (at + before).clamp(max=real.shape[1] - 1)).unsqueeze(2)
    return seen
