"""Attention over the keys that a pattern keeps; what it leaves out is never computed.

Queries go through in blocks. A block takes the keys that its pattern keeps, all heads and rows of the batch in one
product, and masks only where a query of the block may not see a key that another one sees. Grouped queries share their
keys; these are never repeated. Plain PyTorch, so it has gradients on every device.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...checks import check_bool, check_floating, check_int, check_ndim, check_shape, fail
from ...ops.formats.block import BlockMask
from ...ops.formats.stripes import KeyLists, Window, causal_mask
from ...ops.indices import mask_to_indices

Pattern = BlockMask | KeyLists | Window

# (first column, mask of what is hidden from there on, broadcasting to [B, H, rows, columns])
_Hidden = list[tuple[int, Tensor]]
# keys, values, hidden, rows that see nothing
_Tile = tuple[Tensor, Tensor, _Hidden, Tensor | None]


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    padding: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """``softmax(scale * q k^T) v`` over the keys that the pattern keeps and that are not later than the query.

    Args:
        query: ``[B, H, Tq, D]`` float, the last ``Tq`` of the ``Tk`` tokens.
        key: ``[B, H_kv, Tk, D]``, ``H`` a multiple of ``H_kv``.
        value: ``[B, H_kv, Tk, Dv]``.
        pattern: which keys a block of queries sees.
        scale: factor on the logits, ``1 / sqrt(D)`` by default.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        padding: ``[B, Tk]`` bool, False where a key is padding.
        window: sliding window of the model: keys visible, self included, on top of the pattern.

    Returns:
        ``[B, H, Tq, Dv]`` in the dtype of ``query``; 0 where a query sees no key.

    Raises:
        InputError: if shapes do not fit each other or the pattern.
    """
    _check(query, key, value, pattern, padding, window)
    query = query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if isinstance(pattern, Window):
        tiles = _window_tiles(query, key, value, pattern, padding, window)
        block = pattern.q_block
    else:
        lists = as_key_lists(pattern, key.shape[2])
        tiles = _list_tiles(query, key.contiguous(), value.contiguous(), lists, padding, window)
        block = lists.q_block
    parts = [_attend(rows, *tile, softcap) for rows, tile in zip(torch.split(query, block, dim=2), tiles, strict=True)]
    return torch.cat(parts, dim=2)


def attention_recall(
    query: Tensor,
    key: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    padding: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Share of the dense attention mass that the pattern keeps, mean over queries; costs as much as dense attention.

    Args:
        query: ``[B, H, Tq, D]``.
        key: ``[B, H_kv, Tk, D]``.
        pattern: which keys a block of queries sees.
        scale: factor on the logits, ``1 / sqrt(D)`` by default.
        softcap: as in `sparse_attention`.
        padding: ``[B, Tk]`` bool, False where a key is padding.
        window: sliding window of the model.

    Returns:
        ``[B, H]`` float32 in [0, 1]; padded queries are not counted.
    """
    _check(query, key, key, pattern, padding, window)
    batch, heads, queries, dim = query.shape
    keys, offset, block = key.shape[2], key.shape[2] - queries, 128
    mask = (pattern if isinstance(pattern, Window) else as_key_lists(pattern, keys)).visible(
        queries, keys, padding=padding, window=window
    )
    if mask.shape[1] not in (1, heads):
        mask = mask.repeat_interleave(heads // mask.shape[1], dim=1)
    total = torch.zeros(batch, heads, device=query.device)
    for first in range(0, queries, block):
        rows = query[:, :, first : first + block].float() * (1 / math.sqrt(dim) if scale is None else scale)
        stop = offset + first + rows.shape[2]
        logits = _soften((rows.reshape(batch, key.shape[1], -1, dim) @ key[:, :, :stop].float().mT), softcap)
        logits = logits.view(batch, heads, -1, stop)
        seen = causal_mask(rows.shape[2], stop, padding=None if padding is None else padding[:, :stop], window=window)
        prob = logits.masked_fill(~seen.to(logits.device), -math.inf).softmax(-1).nan_to_num(0.0)
        kept = (prob * mask[:, :, first : first + block, :stop]).sum(-1)
        total += (kept if padding is None else kept * padding[:, None, offset + first : stop]).sum(-1)
    counted = torch.tensor(queries) if padding is None else padding[:, offset:].sum(-1, keepdim=True)
    return total / counted.clamp(min=1).to(total.device)


def as_key_lists(pattern: BlockMask | KeyLists, num_keys: int) -> KeyLists:
    """A block mask as lists of the single keys in its blocks; lists stay as they are."""
    if isinstance(pattern, KeyLists):
        return pattern
    blocks = pattern.blocks.repeat_interleave(pattern.k_block, dim=-1)[..., :num_keys]
    return KeyLists.from_mask(blocks, q_block=pattern.q_block)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, hidden: _Hidden, empty: Tensor | None, softcap: float | None
) -> Tensor:
    batch, heads, rows, dim = query.shape
    # The rows of all heads that share keys are one long block.
    score = _soften(query.reshape(batch, keys.shape[1], -1, dim) @ keys.mT, softcap)
    by_head = score.view(batch, heads, rows, keys.shape[2])
    lowest = torch.finfo(score.dtype).min
    for first, mask in hidden:
        by_head[..., first : first + mask.shape[-1]].masked_fill_(mask, lowest)
    out = (score.softmax(-1) @ values).view(batch, heads, rows, values.shape[-1])
    return out if empty is None else out.masked_fill(empty.unsqueeze(-1), 0.0)


def _soften(score: Tensor, softcap: float | None) -> Tensor:
    return score if softcap is None else torch.tanh(score / softcap) * softcap


def _window_tiles(
    query: Tensor, key: Tensor, value: Tensor, pattern: Window, padding: Tensor | None, window: int | None
) -> Iterator[_Tile]:
    """The window of a block is one slice of the keys; sinks that are not in it come in front."""
    queries, keys = query.shape[2], key.shape[2]
    size = pattern.window_size if window is None else min(window, pattern.window_size)
    is_sink = pattern.sink_mask(keys, padding).to(key.device)
    if size == window:  # a sink outside the window is outside the model's too
        is_sink = torch.zeros_like(is_sink)
    sinks, counts = mask_to_indices(is_sink)
    width = sinks.shape[1]
    oldest, newest = (int(sinks[sinks >= 0].min()), int(sinks.max())) if width else (keys, -1)
    sink_key, sink_value = (_take(x, sinks.unsqueeze(1)) for x in (key, value)) if width else (key, value)
    ragged = bool((counts != width).any())
    padded = None if padding is None else (~padding).any(0).cumsum(0).tolist()
    unseen = None
    if padding is not None:
        unseen = pattern.kept_keys(queries, keys, padding=padding, window=window).unsqueeze(1) == 0
    for first in range(0, queries, pattern.q_block):
        start = keys - queries + first
        stop = min(start + pattern.q_block, keys)
        low = max(0, start - size + 1)
        at = torch.arange(start, stop, device=key.device).unsqueeze(-1)
        tile_key, tile_value, front, hidden = key[:, :, low:stop], value[:, :, low:stop], 0, _Hidden()
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
            away = columns <= at - size
            if low <= newest:
                exempt = is_sink[:, None, None, low : stop - size]
                away = away & ~(exempt if window is None else exempt & (columns > at - window))
            hidden.append((front, away))
        if stop - start > 1:
            later = torch.arange(start + 1, stop, device=key.device) > at
            hidden.append((front + start + 1 - low, later))
        if padding is not None and padded is not None and padded[stop - 1] > (padded[low - 1] if low else 0):
            hidden.append((front, ~padding[:, None, None, low:stop]))
        yield tile_key, tile_value, hidden, None if unseen is None else unseen[..., first : first + stop - start]


def _list_tiles(
    query: Tensor, key: Tensor, value: Tensor, lists: KeyLists, padding: Tensor | None, window: int | None
) -> Iterator[_Tile]:
    """The keys of a block are gathered; lists are aligned at their ends, where the causal border is."""
    batch, heads, queries = query.shape[:3]
    keys, group_heads = key.shape[2], key.shape[1]
    positions, counts = lists.positions, lists.counts
    if positions.shape[1] == 1:
        positions = positions.expand(-1, group_heads, -1, -1)
    positions = positions.expand(batch, -1, -1, -1)
    shared = heads // positions.shape[1]
    most, least = counts.amax((0, 1)).tolist(), counts.amin((0, 1)).tolist()
    for index, width in enumerate(most):
        start = keys - queries + index * lists.q_block
        stop = min(start + lists.q_block, keys)
        at = torch.arange(start, stop, device=key.device).unsqueeze(-1)
        column = positions[:, :, index, positions.shape[-1] - width :]
        if window is not None and width:
            column = column[..., int((column <= start - window).sum(-1).min()) :]
        wide = column.unsqueeze(2)
        hidden = _Hidden()
        if padding is None and window is None:
            if width > least[index]:
                hidden.append((0, wide[..., : width - least[index]] < 0))
            tail = int((column > start).sum(-1).max()) if width else 0
            if tail:
                hidden.append((width - tail, wide[..., width - tail :] > at))
            earliest = column.masked_fill(column < 0, keys).amin(-1) if width else column.new_full((1, 1), keys)
            empty = earliest.unsqueeze(-1) > at.T if int(earliest.max()) > start else None
        else:
            away = (wide < 0) | (wide > at)
            if window is not None:
                away = away | (wide <= at - window)
            if padding is not None:
                index_of = column.clamp(min=0).long().flatten(1)
                away = away | ~padding.gather(1, index_of).view(column.shape).unsqueeze(2)
            hidden.append((0, away))
            empty = away.all(-1)
        if shared > 1:
            hidden = [(first, mask.repeat_interleave(shared, dim=1)) for first, mask in hidden]
            empty = None if empty is None or empty.shape[1] == 1 else empty.repeat_interleave(shared, dim=1)
        yield _take(key, column), _take(value, column), hidden, empty


def _take(source: Tensor, positions: Tensor) -> Tensor:
    """Rows of ``source`` ``[B, H_kv, T, D]`` at ``positions`` ``[B or 1, H or 1, n]``; -1 takes any row."""
    batch, group_heads, length, dim = source.shape
    if positions.shape[1] == 1:
        positions = positions.expand(-1, group_heads, -1)
    positions = positions.expand(batch, -1, -1)
    heads = positions.shape[1]
    owner = torch.arange(heads, device=source.device) * group_heads // heads
    row = torch.arange(batch, device=source.device).unsqueeze(-1) * group_heads + owner
    flat = positions.clamp(min=0).long() + row.unsqueeze(-1) * length
    return source.reshape(-1, dim).index_select(0, flat.flatten()).view(batch, heads, -1, dim)


def _check(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, padding: Tensor | None, window: int | None
) -> None:
    name = "sparse_attention"
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        check_ndim(name, argument, tensor, 4)
        check_floating(name, argument, tensor)
    batch, heads, queries, dim = query.shape
    check_shape(name, "key", key, batch, None, None, dim)
    check_shape(name, "value", value, batch, key.shape[1], key.shape[2], None)
    if heads % key.shape[1]:
        raise fail(name, "query", f"have a multiple of {key.shape[1]} heads", heads)
    if queries > key.shape[2]:
        raise fail(name, "query", f"be at most as long as key ({key.shape[2]})", queries)
    if padding is not None:
        check_bool(name, "padding", padding)
        check_shape(name, "padding", padding, batch, key.shape[2])
    if window is not None:
        check_int(name, "window", window)
    check_int(name, "pattern.q_block", pattern.q_block)
    if isinstance(pattern, Window):
        check_int(name, "pattern.window_size", pattern.window_size)
        check_int(name, "pattern.num_sinks", pattern.num_sinks, 0)
        return
    shape: Sequence[int] = (pattern.positions if isinstance(pattern, KeyLists) else pattern.blocks).shape
    if isinstance(pattern, BlockMask) and (pattern.q_len, pattern.kv_len) != (queries, key.shape[2]):
        raise fail(name, "pattern", f"be for {queries} queries and {key.shape[2]} keys", repr(pattern))
    blocks = -(-queries // pattern.q_block)
    if shape[0] not in (1, batch) or shape[1] not in (1, key.shape[1], heads) or shape[2] != blocks:
        wanted = f"fit {batch} rows, {heads} heads and {blocks} blocks of queries"
        raise fail(name, "pattern", wanted, list(shape[:3]))
