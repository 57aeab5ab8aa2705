"""Blocks of a text: pooled vectors, and masks over blocks of queries and blocks of keys.

Queries are the last of the keys, and blocks lie at multiples of the block size of the text: query ``i`` stands at
position ``i + num_keys - num_queries``, so that the first block of queries may lack its front. Both ends may be short.
"""

from typing import Literal

import torch
from torch import Tensor

from ..checks import check_choice, check_divides, check_floating, check_int, check_ndim, check_range, check_shape
from .formats.block import BlockMask

_AT_ONCE = 1 << 20
"""Entries that are widened at once."""


def pool_blocks(
    x: Tensor, block_size: int, *, start: int = 0, reduce: Literal["mean", "sum", "amax", "amin"] = "mean"
) -> Tensor:
    """One vector for each block of the text, over those of its tokens that are there.

    Args:
        x: ``[..., T, D]`` float, the tokens ``start`` to ``start + T`` of the text.
        block_size: tokens in a block.
        start: tokens of the text that come before.
        reduce: how the vectors of a block become one.

    Returns:
        ``[..., n, D]`` float32 (float64 for float64), for the blocks from ``start // block_size`` to that of the last
        token.

    Raises:
        InputError: if ``block_size`` is less than 1, ``start`` less than 0, or ``reduce`` unknown.
    """
    check_int("pool_blocks", "block_size", block_size)
    check_int("pool_blocks", "start", start, 0)
    check_choice("pool_blocks", "reduce", reduce, ("mean", "sum", "amax", "amin"))
    wide = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[-2]
    block_size = min(block_size, max(1, start + length))  # a longer one is the same block
    lead = start % block_size
    num_blocks = -(-(lead + length) // block_size)
    rest = num_blocks * block_size - lead - length
    if lead or rest:
        empty = {"amax": -torch.inf, "amin": torch.inf}.get(reduce, 0.0)
        x = torch.nn.functional.pad(x, (0, 0, lead, rest), value=empty)
    tiles = x.reshape(*x.shape[:-2], num_blocks, block_size, x.shape[-1])
    # A few blocks at a time: a wider copy of all of a long text costs more than its sum.
    step = max(1, _AT_ONCE * num_blocks // max(1, tiles.numel()))
    parts = torch.split(tiles, step, dim=-3) if x.dtype != wide else (tiles,)
    if reduce in ("amax", "amin"):
        reduced = [part.amax(-2) if reduce == "amax" else part.amin(-2) for part in parts]
        return torch.cat(reduced, dim=-2).to(wide)
    total = torch.cat([part.to(wide).sum(-2) for part in parts], dim=-2)
    if reduce == "sum":
        return total
    return total / block_lengths(length, block_size, start=start, device=x.device).unsqueeze(-1)


def block_lengths(length: int, block_size: int, *, start: int = 0, device: torch.device | None = None) -> Tensor:
    """How many of the tokens ``start`` to ``start + length`` are in each block: ``[n]`` int64, as `pool_blocks`."""
    first = start // block_size
    edges = torch.arange(first, -(-(start + length) // block_size) + 1, device=device) * block_size
    return edges.clamp(start, start + length).diff()


def visible_blocks(
    num_queries: int,
    num_keys: int,
    q_block: int,
    k_block: int,
    *,
    window: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Blocks with a pair of a query and a key that it sees: bool ``[blocks of queries, blocks of keys]``.

    Args:
        num_queries: the last tokens.
        num_keys: all tokens.
        q_block: queries in a block.
        k_block: keys in a block.
        window: keys visible to a query, itself included; None is all.
        device: where the mask lives.
    """
    first = num_keys - num_queries
    low = (torch.arange(first // q_block, -(-num_keys // q_block), device=device) * q_block).clamp(min=first)
    high = (low // q_block * q_block + q_block).clamp(max=num_keys)
    start = torch.arange(0, num_keys, k_block, device=device)
    seen = start < high.unsqueeze(-1)
    if window is not None:
        seen &= (start + k_block).clamp(max=num_keys) > (low - window + 1).unsqueeze(-1)
    return seen


def block_mask(blocks: Tensor, num_queries: int, num_keys: int, *, q_block: int, k_block: int) -> BlockMask:
    """A `BlockMask` of ``blocks`` ``[B, H, n, m]``, whose first block of queries is whole (``q_len`` counts its front).

    Raises:
        InputError: if the shape does not fit.
    """
    check_ndim("block_mask", "blocks", blocks, 4)
    lead = (num_keys - num_queries) % q_block
    return BlockMask(blocks, q_block, k_block, num_queries + lead, num_keys)


def diagonal_blocks(
    num_queries: int, num_keys: int, q_block: int, k_block: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Blocks of keys that hold the position of a query of the row: bool ``[blocks of queries, blocks of keys]``.

    Arguments as in `visible_blocks`; the first block of queries counts as whole.
    """
    first = num_keys - num_queries
    low = torch.arange(first // q_block, -(-num_keys // q_block), device=device).unsqueeze(-1) * q_block
    start = torch.arange(0, num_keys, k_block, device=device)
    return (start < (low + q_block).clamp(max=num_keys)) & (start + k_block > low)


def grouped_products(query: Tensor, key: Tensor) -> Tensor:
    """``q . k`` for all pairs, without repeated keys: ``[B, H, n, m]``.

    Args:
        query: ``[B, H, n, D]`` float.
        key: ``[B, H_kv, m, D]`` of the same dtype, ``H`` a multiple of ``H_kv``.

    Raises:
        InputError: if the shapes do not fit each other.
    """
    check_ndim("grouped_products", "query", query, 4)
    batch, heads, rows, dim = query.shape
    check_shape("grouped_products", "key", key, batch, None, None, dim)
    check_divides("grouped_products", "the heads of key", key.shape[1], heads, "the heads of query")
    # Sizes are spelled out: -1 is ambiguous where nothing is there.
    together = query.reshape(batch, key.shape[1], heads // key.shape[1] * rows, dim)
    return (together @ key.mT).view(batch, heads, rows, key.shape[2])


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(logits / softcap)``, which stays within ``softcap`` of 0; ``logits`` as they are for None."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def cover_mask(mass: Tensor, share: float, *, forced: Tensor | None = None) -> Tensor:
    """The fewest entries of every row that, with the forced ones, hold ``share`` of its mass: bool ``[..., n]``.

    The highest are taken first, between equal ones the first.

    Args:
        mass: ``[..., n]`` float, not negative.
        share: in (0, 1]; 1 keeps everything.
        forced: bool that broadcasts to ``mass``: entries that always stay and count towards the share; a row in which
            they already hold it keeps nothing else.

    Raises:
        InputError: if ``share`` is out of range.
    """
    check_floating("cover_mask", "mass", mass)
    check_range("cover_mask", "share", share, 0, 1, open_low=True)
    if share == 1:
        return torch.ones_like(mass, dtype=torch.bool)
    rows = mass.detach()
    rank = rows if forced is None else rows.masked_fill(forced, torch.inf)
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    high = rows.gather(-1, order).double()
    reached = high.cumsum(-1)
    kept = torch.empty_like(rows, dtype=torch.bool).scatter_(-1, order, reached - high < share * reached[..., -1:])
    return kept if forced is None else kept | forced
