"""The tiles of sparse attention: for a block of queries the keys that its pattern keeps, and who may not see which.

Grouped queries share their keys; these are never repeated. A tile is masked only where a query of the block may not
see a key that another one sees.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import fail
from ...ops.formats.block import BlockMask
from ...ops.formats.stripes import KeyLists, Window
from ...ops.indices import mask_to_indices
from .problem import Problem

# (first column, what is hidden from there on: bool, broadcasting to [B, H, rows, columns])
Hidden = list[tuple[int, Tensor]]


class Tile(NamedTuple):
    """The keys of one block of queries: some gathered, and behind them a slice.

    Attributes:
        keys: ``[B, heads, n, D]``; ``heads`` is H or H_kv. Keys that no query of the block sees are 0.
        values: ``[B, heads, n, Dv]``.
        hidden: what queries of the block may not see.
        bias: ``[B or 1, H or 1, rows or 1, n]``.
        taken: positions of the gathered keys, ``[B or 1, heads or 1, width]``, -1 for none.
        low: where the slice begins.
        stop: where the slice ends.
    """

    keys: Tensor
    values: Tensor
    hidden: Hidden
    bias: Tensor | None
    taken: Tensor | None
    low: int
    stop: int


def tiles(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Iterator[Tile]:
    """One tile for each block of ``pattern.q_block`` queries, in order."""
    if isinstance(problem.pattern, Window):
        raw = _window_tiles(query, key, value, problem, problem.pattern)
    else:
        raw = _list_tiles(query, key.contiguous(), value.contiguous(), problem, problem.pattern)
    return map(_blank_unseen, raw)


def as_key_lists(pattern: BlockMask | KeyLists, num_keys: int) -> KeyLists:
    """A block mask as lists of the single keys in its blocks; lists stay as they are.

    Raises:
        InputError: if the mask has partial blocks, which lists cannot tell.
    """
    if isinstance(pattern, KeyLists):
        return pattern
    if pattern.partial is not None:
        raise fail("as_key_lists", "pattern", "have no partial blocks", repr(pattern))
    return _whole_blocks(pattern, num_keys, causal=False)


def add_rows(total: Tensor, part: Tensor, tile: Tile) -> None:
    """Add ``part`` ``[B, heads, n, D]``, rows of the tile's keys, to ``total`` ``[B, H_kv, Tk, D]``, all keys."""
    front = 0
    if tile.taken is not None:
        front = tile.taken.shape[-1]
        flat = _flat_rows(total, tile.taken).flatten()
        rows = part[:, :, :front].flatten(0, 2).to(total.dtype)
        total.flatten(0, 2).scatter_add_(0, flat.unsqueeze(-1).expand_as(rows), rows)
    if tile.stop > tile.low:
        total[:, :, tile.low : tile.stop] += part[:, :, front:]


def add_columns(total: Tensor, part: Tensor, tile: Tile) -> None:
    """Add ``part`` ``[B, H, rows, n]`` to ``total`` ``[B or 1, H or 1, rows, Tk]``, summed where that is 1."""
    front = 0
    if tile.taken is not None:
        front = tile.taken.shape[-1]
        index = _by_head(tile.taken, part.shape[1]).unsqueeze(2).expand(part.shape[0], part.shape[1], part.shape[2], -1)
        wide = part.new_zeros(*part.shape[:3], total.shape[-1])
        wide.scatter_add_(-1, index.clamp(min=0).long(), part[..., :front])
        total += wide.sum_to_size(total.shape)
    if tile.stop > tile.low:
        near = total[..., tile.low : tile.stop]
        near += part[..., front:].sum_to_size(near.shape)


def _window_tiles(query: Tensor, key: Tensor, value: Tensor, problem: Problem, pattern: Window) -> Iterator[Tile]:
    """The window of a block is one slice of the keys; sinks that are not in it come in front."""
    queries, keys, padding, window = query.shape[2], key.shape[2], problem.padding, problem.window
    size = pattern.window_size if window is None else min(window, pattern.window_size)
    is_sink = pattern.sink_mask(keys, padding).to(key.device)
    if size == window:  # a sink outside the window is outside the model's too
        is_sink = torch.zeros_like(is_sink)
    sinks, counts = mask_to_indices(is_sink)
    width = sinks.shape[1]
    oldest, newest = (int(sinks[sinks >= 0].min()), int(sinks.max())) if width else (keys, -1)
    taken = sinks.unsqueeze(1)
    sink_key, sink_value = (_take(x, taken) for x in (key, value)) if width else (key, value)
    ragged = bool((counts != width).any())
    padded = None if padding is None else (~padding).any(0).cumsum(0).tolist()
    for first in range(0, queries, pattern.q_block):
        start = keys - queries + first
        stop = min(start + pattern.q_block, keys)
        low = max(0, start - size + 1)
        at = torch.arange(start, stop, device=key.device).unsqueeze(-1)
        tile_key, tile_value, front, hidden = key[:, :, low:stop], value[:, :, low:stop], 0, Hidden()
        if oldest < low and (window is None or newest > start - window):
            front = width
            tile_key = torch.cat([sink_key, tile_key], dim=2)
            tile_value = torch.cat([sink_value, tile_value], dim=2)
            if ragged or newest >= low or window is not None:
                columns = sinks[:, None, None]
                away = (columns >= low) | (columns < 0)
                hidden.append((0, away if window is None else away | (columns <= at - window)))
        if stop - size > low:
            columns = torch.arange(low, stop - size, device=key.device)
            away = (columns <= at - size)[None, None]
            if low <= newest:
                exempt = is_sink[:, None, None, low : stop - size]
                away = away & ~(exempt if window is None else exempt & (columns > at - window))
            hidden.append((front, away))
        if stop - start > 1:
            later = torch.arange(start + 1, stop, device=key.device) > at
            hidden.append((front + start + 1 - low, later[None, None]))
        if padding is not None and padded is not None and padded[stop - 1] > (padded[low - 1] if low else 0):
            hidden.append((front, ~padding[:, None, None, low:stop]))
        tile = Tile(tile_key, tile_value, hidden, None, taken if front else None, low, stop)
        yield tile if problem.bias is None else _biased(tile, problem.bias, query.shape[1], first, pattern.q_block)


def _list_tiles(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem, pattern: BlockMask | KeyLists
) -> Iterator[Tile]:
    """The keys of a block are gathered; lists are aligned at their ends, where the causal border is."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    lists = pattern if isinstance(pattern, KeyLists) else _whole_blocks(pattern, keys, causal=problem.causal)
    partly = isinstance(pattern, BlockMask) and pattern.partial is not None
    padding, window, positions = problem.padding, problem.window, lists.positions
    if positions.shape[1] == 1:
        positions = positions.expand(-1, key.shape[1], -1, -1)
    positions = positions.expand(query.shape[0], -1, -1, -1)
    most, least = lists.counts.amax((0, 1)).tolist(), lists.counts.amin((0, 1)).tolist()
    for index, width in enumerate(most):
        start = keys - queries + index * lists.q_block
        stop = min(start + lists.q_block, keys)
        at = torch.arange(start, stop, device=key.device).unsqueeze(-1)
        column = positions[:, :, index, positions.shape[-1] - width :]
        if window is not None and width:
            column = column[..., int((column <= start - window).sum(-1).min()) :]
        wide, hidden = column.unsqueeze(2), Hidden()
        if padding is not None or window is not None or partly:
            away = wide < 0
            if problem.causal:
                away = away | (wide > at)
            if window is not None:
                away = away | (wide <= at - window)
            if padding is not None:
                index_of = column.clamp(min=0).long().flatten(1)
                away = away | ~padding.gather(1, index_of).view(column.shape).unsqueeze(2)
            if partly and isinstance(pattern, BlockMask):
                away = away | _left_out(pattern, column, index, stop - start)
            hidden.append((0, away))
        else:
            if width > least[index]:
                hidden.append((0, wide[..., : width - least[index]] < 0))
            tail = int((column > start).sum(-1).max()) if width and problem.causal else 0
            if tail:
                hidden.append((width - tail, wide[..., width - tail :] > at))
        hidden = [(first, _by_head(mask, heads)) for first, mask in hidden]
        tile = Tile(_take(key, column), _take(value, column), hidden, None, column, 0, 0)
        first = index * lists.q_block
        yield tile if problem.bias is None else _biased(tile, problem.bias, heads, first, lists.q_block)


def _whole_blocks(pattern: BlockMask, num_keys: int, *, causal: bool) -> KeyLists:
    """The keys of kept blocks, partial ones whole; with ``causal`` only those that a query of the block may see."""
    kept = pattern.blocks.repeat_interleave(pattern.k_block, dim=-1)[..., :num_keys]
    if causal:
        last = torch.arange(1, kept.shape[2] + 1, device=kept.device) * pattern.q_block + num_keys - pattern.q_len
        kept = kept & (torch.arange(num_keys, device=kept.device) < last.unsqueeze(-1))
    return KeyLists.from_mask(kept, q_block=pattern.q_block)


def _left_out(pattern: BlockMask, column: Tensor, index: int, rows: int) -> Tensor:
    """What the partial blocks of a row of blocks leave out, ``[B, heads, rows, n]``, at key positions ``column``."""
    assert pattern.partial is not None
    assert pattern.elements is not None
    if not len(pattern.elements):
        return torch.zeros_like(column, dtype=torch.bool).unsqueeze(2)
    batch, heads, _ = column.shape
    at = column.clamp(min=0).long()
    entry = pattern.partial[:, :, index].expand(batch, heads, -1).gather(-1, at // pattern.k_block)
    kept = pattern.elements.mT[entry.clamp(min=0).long(), at % pattern.k_block, :rows].mT
    return ~kept & (entry >= 0).unsqueeze(2)


def _biased(tile: Tile, bias: Tensor, heads: int, first: int, q_block: int) -> Tile:
    """The tile with its part of ``bias``; what is -inf there is hidden too."""
    rows = bias if bias.shape[2] == 1 else bias[:, :, first : first + q_block]
    parts = [rows[..., tile.low : tile.stop]]
    if tile.taken is not None:
        index = _by_head(tile.taken, heads).clamp(min=0).long().unsqueeze(2)
        batch = max(len(index), len(rows))
        around = (batch, max(index.shape[1], rows.shape[1]), rows.shape[2])
        parts.insert(0, rows.expand(*around, -1).gather(-1, index.expand(*around, -1)))
        parts[1] = parts[1].expand(*around, -1)
    here = torch.cat(parts, dim=-1)
    hidden = here == -torch.inf
    for start, mask in tile.hidden:  # in one mask: a key may be hidden from some queries by one, from others by another
        hidden = hidden | torch.nn.functional.pad(mask, (start, hidden.shape[-1] - start - mask.shape[-1]))
    return tile._replace(bias=here, hidden=[(0, hidden)])


def _blank_unseen(tile: Tile) -> Tile:
    """What keys hold that no query of the block sees, NaN even, must not meet its weight of 0."""
    heads, columns = tile.keys.shape[1:3]
    for first, mask in tile.hidden:
        unseen = mask.all(2)
        if not unseen.any():
            continue
        if unseen.shape[1] not in (1, heads):
            unseen = unseen.view(len(unseen), heads, -1, unseen.shape[-1]).all(2)
        wide = torch.nn.functional.pad(unseen, (first, columns - first - unseen.shape[-1])).unsqueeze(-1)
        tile = tile._replace(keys=tile.keys.masked_fill(wide, 0), values=tile.values.masked_fill(wide, 0))
    return tile


def _by_head(mask: Tensor, heads: int) -> Tensor:
    """``[B, h, ...]`` repeated to one entry for each query head, or left at 1."""
    return mask if mask.shape[1] in (1, heads) else mask.repeat_interleave(heads // mask.shape[1], dim=1)


def _take(source: Tensor, positions: Tensor) -> Tensor:
    """Rows of ``source`` ``[B, H_kv, T, D]`` at ``positions`` ``[B or 1, H or 1, n]``; -1 takes any row."""
    flat = _flat_rows(source, positions)
    return source.flatten(0, 2).index_select(0, flat.flatten()).view(*flat.shape, source.shape[-1])


def _flat_rows(source: Tensor, positions: Tensor) -> Tensor:
    """Where the rows at ``positions`` are in ``source.view(-1, D)``: ``[B, H or H_kv, n]`` int64."""
    batch, group_heads, length, _ = source.shape
    if positions.shape[1] == 1:
        positions = positions.expand(-1, group_heads, -1)
    positions = positions.expand(batch, -1, -1)
    heads = positions.shape[1]
    owner = torch.arange(heads, device=source.device) * group_heads // heads
    row = torch.arange(batch, device=source.device).unsqueeze(-1) * group_heads + owner
    return positions.clamp(min=0).long() + row.unsqueeze(-1) * length
