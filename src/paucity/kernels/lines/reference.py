"""What the operators on lines compute, through the mask of a few blocks of queries at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...ops.formats.stripes import causal_mask

_ENTRIES = 1 << 24  # of a mask, at most, if it has more than one block of queries


def mass(last: Tensor, key: Tensor, scale: float, softcap: float | None, window: int | None) -> tuple[Tensor, Tensor]:
    """Attention mass by position and by distance, ``[B, H, Tk]`` float32 each."""
    (batch, heads, rows, dim), (group_heads, keys) = last.shape, key.shape[1:3]
    # With as many keys in front as there are rows, which nobody sees, and rows that are read as if they were longer by
    # one entry, the entries of a distance stand in one column.
    padded = torch.nn.functional.pad(key.float(), (0, 0, rows, 0))
    queries = (last.float() * scale).reshape(batch, group_heads, heads // max(1, group_heads) * rows, dim)
    logits = (queries @ padded.mT).view(batch, heads, rows, rows + keys)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    seen = causal_mask(rows, keys, window=window, device=key.device)
    logits.masked_fill_(~torch.nn.functional.pad(seen, (rows, 0)), -torch.inf)
    prob = logits.softmax(-1)
    diagonals = prob.as_strided((batch, heads, rows, keys), (*prob.stride()[:2], rows + keys + 1, 1), 1)
    return prob[..., rows:].sum(-2), diagonals.sum(-2).flip(-1)


def counts(vertical: Tensor, slash: Tensor, num_queries: int, q_block: int) -> Tensor:
    """How many keys each block of queries sees, ``[B, H, blocks]`` int64."""
    found = [mask.sum(-1) for mask in _masks(vertical, slash, num_queries, q_block)]
    return torch.cat(found, -1) if found else vertical.new_zeros(*vertical.shape[:2], 0, dtype=torch.int64)


def positions(vertical: Tensor, slash: Tensor, counts: Tensor, num_queries: int, q_block: int, width: int) -> Tensor:
    """The keys, ``[B, H, blocks, width]`` int32, ascending at the end of their row, -1 in front."""
    found, block = counts.new_full((*counts.shape, width), -1, dtype=torch.int32), 0
    for mask in _masks(vertical, slash, num_queries, q_block):
        rows = found[:, :, block : block + mask.shape[2]]
        # Both sides run through the rows in the same order, so the positions land in their own rows.
        used = torch.arange(width, device=rows.device) >= width - mask.sum(-1, keepdim=True)
        keys = mask.reshape(-1, mask.shape[-1]).nonzero(as_tuple=True)[1].int()
        rows.copy_(torch.full_like(rows, -1).masked_scatter_(used, keys))
        block += mask.shape[2]
    return found


def _masks(vertical: Tensor, slash: Tensor, num_queries: int, q_block: int) -> Iterator[Tensor]:
    """The keys of some blocks of queries after the others, bool ``[B, H, n, Tk]``."""
    keys, device = vertical.shape[-1], vertical.device
    first = (keys - num_queries) // q_block * q_block
    starts = torch.arange(first, keys if num_queries else first, q_block, device=device)
    covered, place = covered_by(slash, q_block), torch.arange(keys, device=device)
    step = max(1, _ENTRIES // max(1, vertical.numel()))
    for at in range(0, len(starts), step):
        some = starts[at : at + step]
        tiles = covered[..., keys + place - some.unsqueeze(-1)]
        yield tiles | (vertical.unsqueeze(-2) & (place < (some + q_block).unsqueeze(-1)))


def covered_by(slash: Tensor, q_block: int) -> Tensor:
    """Whether a tile holds the key at a distance from the first query of a block, whatever the block.

    Key ``j`` is in the tile of distance ``d`` if ``start - j <= d < start - j + q_block``: that is a question of
    ``j - start`` alone, and the answer stands at ``Tk + j - start``. ``[B, H, Tk] -> [B, H, 2 * Tk + q_block]``.
    """
    keys = slash.shape[-1]
    before = torch.nn.functional.pad(slash.cumsum(-1, dtype=torch.int32), (q_block, 0))
    before = torch.cat([before, before[..., -1:].expand(*before.shape[:-1], q_block)], dim=-1)
    covered = (before[..., q_block:] > before[..., :-q_block]).flip(-1)
    return torch.nn.functional.pad(covered, (0, keys))
