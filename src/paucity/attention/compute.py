"""Attention over a pattern that was chosen for a prompt, and the heads that it is for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels.attention import Pattern, sparse_attention
from ..ops.formats.block import BlockMask
from ..ops.formats.stripes import KeyLists, Window
from .prompt import Prompt


@dataclass(frozen=True)
class Part:
    """A pattern and the heads that compute it.

    Attributes:
        pattern: what they see, with blocks of queries at multiples of ``q_block`` of the text.
        heads: which query heads, by their place in the query; None is all.
        kv_heads: the key-value heads of those, each shared by equally many of them in succession; None is all.
    """

    pattern: Pattern
    heads: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Attended:
    """What a policy made of a prompt.

    Attributes:
        out: ``[B, H, Tq, Dv]``.
        kept: ``[B or 1, H or 1]`` int64, pairs of a query and a key that were computed.
        parts: the patterns, which together have every head once; None where it was not attention over patterns.
        select_seconds: time spent on choosing; on a GPU only that of the launches.
    """

    out: Tensor
    kept: Tensor
    parts: tuple[Part, ...] | None
    select_seconds: float = 0.0


def attend_pattern(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, prompt: Prompt, *, select_seconds: float = 0.0
) -> Attended:
    """Attention over ``pattern``, whose blocks of queries lie at multiples of ``q_block`` of the text.

    Args:
        query: ``[B, H, Tq, D]``, the last ``Tq`` of the ``Tk`` tokens.
        key: ``[B, H_kv, Tk, D]``.
        value: ``[B, H_kv, Tk, Dv]``.
        pattern: as `PrefillPolicy.select` gives it.
        prompt: scale, softcap and window.
        select_seconds: handed on.
    """
    lead = lead_of(pattern, query.shape[2], key.shape[2])
    out = sparse_attention(
        pad(query, (0, 0, lead, 0)) if lead else query,
        key,
        value,
        pattern,
        scale=prompt.scale,
        softcap=prompt.softcap,
        window=prompt.window,
    )
    kept = kept_pairs(pattern, query.shape[2], key.shape[2], window=prompt.window)
    return Attended(out[:, :, lead:], kept, (Part(pattern),), select_seconds)


def attend_exactly(query: Tensor, key: Tensor, value: Tensor, prompt: Prompt) -> Attended:
    """Dense attention, that of the model; shapes as in `attend_pattern`."""
    return attend_pattern(query, key, value, Window(max(1, key.shape[2])), prompt)


def rows_see_all(done: Attended, lines: Tensor, query: Tensor, key: Tensor, value: Tensor, prompt: Prompt) -> Attended:
    """Replace what queries on lines, bool ``[B, H, Tq]``, made by attention over all keys that they may see."""
    (batch, heads, queries, dim), keys, block = query.shape, key.shape[2], 64
    rows = KeyLists.from_mask(lines.unsqueeze(2), q_block=1).positions.squeeze(2).long()
    at = torch.where(rows >= 0, rows + keys - queries, -1)
    chosen = query.gather(2, rows.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, dim))
    tall = pad(at, (0, -at.shape[-1] % block), value=-1).view(batch, heads, -1, block)
    oldest = torch.zeros_like(tall) if prompt.window is None else tall - prompt.window + 1
    low = torch.arange(0, keys, block, device=key.device)
    high = (low + block).clamp(max=keys) - 1
    newest, earliest = tall.amax(-1, keepdim=True), oldest.amin(-1, keepdim=True)
    some = (low <= newest) & (high >= earliest) & (newest >= 0)
    every = (tall.amin(-1, keepdim=True) >= high) & (oldest.amax(-1, keepdim=True) <= low)
    b, h, i, j = (some & ~every).nonzero(as_tuple=True)
    key_at = (low[j].unsqueeze(-1) + torch.arange(block, device=key.device)).unsqueeze(1)
    elements = (key_at <= tall[b, h, i].unsqueeze(-1)) & (key_at >= oldest[b, h, i].unsqueeze(-1))
    partial = torch.full_like(some, -1, dtype=torch.int32)
    partial[b, h, i, j] = torch.arange(len(b), dtype=torch.int32, device=key.device)
    pattern = BlockMask(some, block, block, rows.shape[-1], keys, partial, elements)
    whole = sparse_attention(chosen, key, value, pattern, scale=prompt.scale, softcap=prompt.softcap, causal=False)
    b, h, n = (rows >= 0).nonzero(as_tuple=True)
    out = done.out.index_put((b, h, rows[b, h, n]), whole[b, h, n])
    seen = (at + 1 if prompt.window is None else (at + 1).clamp(max=prompt.window)) * (rows >= 0)
    return Attended(out, done.kept + seen.sum(-1), None, done.select_seconds)


def even_groups(heads: Sequence[int], share: int) -> list[tuple[list[int], list[int]]]:
    """Query heads in groups in which every key-value head has equally many: (query heads, key-value heads) of each.

    Args:
        heads: query heads, ascending.
        share: query heads that share a key-value head.
    """
    by_kv: dict[int, list[int]] = {}
    for head in heads:
        by_kv.setdefault(head // share, []).append(head)
    groups: dict[int, tuple[list[int], list[int]]] = {}
    for kv, mine in by_kv.items():
        group = groups.setdefault(len(mine), ([], []))
        group[0].extend(mine)
        group[1].append(kv)
    return list(groups.values())


def take_heads(tensor: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of ``[B, H, T, D]``, without a copy where they lie in succession."""
    if list(heads) == list(range(heads[0], heads[-1] + 1)):
        return tensor[:, heads[0] : heads[-1] + 1]
    return tensor[:, list(heads)]


def lead_of(pattern: Pattern, num_queries: int, num_keys: int) -> int:
    """Queries missing at the front of the first block, where blocks lie at multiples of ``q_block`` of the text."""
    return 0 if isinstance(pattern, Window) else (num_keys - num_queries) % pattern.q_block


def kept_pairs(pattern: Pattern, num_queries: int, num_keys: int, *, window: int | None = None) -> Tensor:
    """Pairs of a query and a key that it sees, ``[B, H]`` int64, with blocks of queries at multiples of ``q_block``."""
    lead = lead_of(pattern, num_queries, num_keys)
    kept = pattern.kept_pairs(num_queries + lead, num_keys, window=window)
    if not lead:
        return kept
    before = num_keys - num_queries  # the missing queries are the last of these
    return kept - first_row(pattern, lead, before).kept_pairs(lead, before, window=window)


def first_row(pattern: Pattern, num_queries: int, num_keys: int) -> Pattern:
    """The first block of queries alone, as if the text ended after ``num_keys``."""
    if isinstance(pattern, KeyLists):
        return KeyLists(pattern.positions[:, :, :1], pattern.counts[:, :, :1], pattern.q_block)
    assert isinstance(pattern, BlockMask)
    blocks = -(-num_keys // pattern.k_block)
    partial = None if pattern.partial is None else pattern.partial[:, :, :1, :blocks]
    return replace(
        pattern, blocks=pattern.blocks[:, :, :1, :blocks], partial=partial, q_len=num_queries, kv_len=num_keys
    )
