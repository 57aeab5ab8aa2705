"""Which keys the queries of a block see: a list of single positions (stripes), or a window with sinks.

Queries are the last ``num_queries`` of ``num_keys`` tokens, so query ``i`` is at position
``i + num_keys - num_queries``. Every pattern is meant inside the causal triangle: a query never sees a later key,
whatever the pattern holds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import check_bool, check_int, check_ndim, fail


@dataclass(frozen=True)
class KeyLists:
    """For every block of queries the key positions that it sees, one list per head.

    Attributes:
        positions: ``[B, H, num_blocks, width]`` int32, ascending; shorter lists have -1 in front. ``B`` may be 1 for a
            whole batch; ``H`` is the number of query heads, of key-value heads or 1, and heads that share a list share
            the work of gathering.
        counts: ``[B, H, num_blocks]`` int64, entries of each list.
        q_block: queries in a block; the last block may be shorter.
    """

    positions: Tensor
    counts: Tensor
    q_block: int

    @classmethod
    def from_mask(cls, mask: Tensor, *, q_block: int) -> "KeyLists":
        """From a bool mask ``[B, H, num_blocks, num_keys]``.

        Raises:
            InputError: if ``mask`` has another number of dimensions or ``q_block`` is less than 1.
        """
        check_ndim("KeyLists.from_mask", "mask", mask, 4)
        check_bool("KeyLists.from_mask", "mask", mask)
        check_int("KeyLists.from_mask", "q_block", q_block)
        counts = mask.sum(-1)
        width = int(counts.max()) if counts.numel() else 0
        positions = torch.full((*counts.shape, width), -1, dtype=torch.int32, device=mask.device)
        # Both sides run through the rows in the same order, so the positions land in their own rows.
        used = torch.arange(width, device=mask.device) >= width - counts.unsqueeze(-1)
        columns = mask.reshape(-1, mask.shape[-1]).nonzero(as_tuple=True)[1].int()
        return cls(positions.masked_scatter_(used, columns), counts, q_block)

    def visible(
        self, num_queries: int, num_keys: int, *, padding: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        """The pattern as a bool mask ``[B, H, num_queries, num_keys]``; arguments as in `causal_mask`."""
        rows = torch.zeros((*self.counts.shape, num_keys + 1), dtype=torch.bool, device=self.positions.device)
        rows.scatter_(-1, (self.positions.long() % (num_keys + 1)), True)
        rows = rows[..., :num_keys].repeat_interleave(min(self.q_block, num_queries), dim=2)[:, :, :num_queries]
        return rows & causal_mask(num_queries, num_keys, padding=padding, window=window, device=rows.device)

    def kept_pairs(
        self, num_queries: int, num_keys: int, *, padding: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        """Pairs of a query and a key that it sees, ``[B, H]`` int64, padded queries not counted."""
        if padding is None and (window is None or window >= num_keys) and self.positions.numel():
            return self._causal_pairs(num_keys - num_queries, num_keys)
        key, offset = self.positions.long(), num_keys - num_queries
        start = offset + self.q_block * torch.arange(key.shape[2], device=key.device).view(-1, 1)
        stop = (start + self.q_block).clamp(max=num_keys)
        if window is not None:
            stop = torch.minimum(stop, key + window)
        first, used = torch.maximum(key, start), key >= 0
        if padding is None:
            rows = (stop - first).clamp(min=0)
        else:
            batch = max(len(key), len(padding))
            before = _running_count(padding).expand(batch, -1)[:, None, None].expand(batch, *key.shape[1:3], -1)
            first, stop, at = (x.expand(batch, *key.shape[1:]) for x in (first, stop, key.clamp(min=0)))
            rows = (before.gather(-1, stop.clamp(min=0)) - before.gather(-1, first)).clamp(min=0)
            used = used & (before.gather(-1, at + 1) > before.gather(-1, at))
        return (rows * used).sum((-1, -2))

    def _causal_pairs(self, offset: int, num_keys: int) -> Tensor:
        """As `kept_pairs`: all queries of a block see the keys before it, so that only those inside are looked at."""
        rows, width = self.positions.contiguous(), self.positions.shape[-1]
        start = offset + self.q_block * torch.arange(rows.shape[2], device=rows.device)
        stop = (start + self.q_block).clamp(max=num_keys)
        edges = torch.stack([torch.zeros_like(start), start, stop], dim=-1).to(rows.dtype)
        first, own, end = torch.searchsorted(rows, edges.expand(*rows.shape[:2], -1, -1).contiguous()).unbind(-1)
        place = own.unsqueeze(-1) + torch.arange(min(self.q_block, width), device=rows.device)
        key = rows.gather(-1, place.clamp(max=width - 1)).long()
        inside = ((stop.unsqueeze(-1) - key) * (place < end.unsqueeze(-1))).sum(-1)
        return ((own - first) * (stop - start) + inside).sum(-1)


@dataclass(frozen=True)
class Window:
    """Every query sees its last ``window_size`` keys, itself included, and the first ``num_sinks`` keys of the text.

    Exact for every query, whatever ``q_block`` is; that is only how many queries are computed together.

    Attributes:
        window_size: keys visible, self included.
        num_sinks: keys at the start that are always visible; with padding, the first ones that are not padding.
        q_block: queries in a block.
        dropped: ``[B]`` int64 or None, keys of the text that a cropped cache no longer holds; these were first.
    """

    window_size: int
    num_sinks: int = 0
    q_block: int = 128
    dropped: Tensor | None = None

    def sinks_left(self) -> Tensor:
        """How many sinks may still be among the keys, ``[B or 1, 1]`` int64."""
        if self.dropped is None:
            return torch.tensor([[self.num_sinks]])
        return (self.num_sinks - self.dropped).clamp(min=0).unsqueeze(-1)

    def sink_mask(self, num_keys: int, padding: Tensor | None = None) -> Tensor:
        """Which keys are sinks, ``[B or 1, num_keys]`` bool."""
        valid = torch.ones(1, num_keys, dtype=torch.bool) if padding is None else padding
        return valid & (_running_count(valid)[:, :-1] < self.sinks_left().to(valid.device))

    def visible(
        self, num_queries: int, num_keys: int, *, padding: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        """The pattern as a bool mask ``[B or 1, 1, num_queries, num_keys]``; arguments as in `causal_mask`."""
        near = causal_mask(num_queries, num_keys, padding=padding, window=self.window_size)
        near = near | self.sink_mask(num_keys, padding)[:, None, None].to(near.device)
        return near & causal_mask(num_queries, num_keys, padding=padding, window=window, device=near.device)

    def kept_keys(
        self, num_queries: int, num_keys: int, *, padding: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        """How many keys each query sees, ``[B or 1, num_queries]`` int64."""
        valid = torch.ones(1, num_keys, dtype=torch.bool) if padding is None else padding
        before, sinks = _running_count(valid), self.sinks_left().to(valid.device)
        query = torch.arange(num_keys - num_queries, num_keys, device=valid.device)
        oldest = (query - (num_keys if window is None else window) + 1).clamp(min=0)
        near = torch.maximum((query - self.window_size + 1).clamp(min=0), oldest)
        far = torch.minimum(before[:, near], sinks) - torch.minimum(before[:, oldest], sinks)
        return before[:, query + 1] - before[:, near] + far

    def kept_pairs(
        self, num_queries: int, num_keys: int, *, padding: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        """Pairs of a query and a key that it sees, ``[B or 1, 1]`` int64, padded queries not counted."""
        kept = self.kept_keys(num_queries, num_keys, padding=padding, window=window)
        return (kept if padding is None else kept * padding[:, num_keys - num_queries :]).sum(-1, keepdim=True)


def causal_mask(
    num_queries: int,
    num_keys: int,
    *,
    padding: Tensor | None = None,
    window: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """What a causal model lets every query see.

    Args:
        num_queries: the last tokens, at most ``num_keys``.
        num_keys: all tokens.
        padding: ``[B, num_keys]`` bool, False where a key is padding.
        window: keys visible to a query, itself included; None is all.
        device: where the mask lives; by default that of ``padding``.

    Returns:
        bool ``[B or 1, 1, num_queries, num_keys]``.

    Raises:
        InputError: if there are more queries than keys.
    """
    if num_queries > num_keys:
        raise fail("causal_mask", "num_queries", f"be at most num_keys ({num_keys})", num_queries)
    device = device if padding is None else padding.device
    key = torch.arange(num_keys, device=device)
    query = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(-1)
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask[None, None] if padding is None else mask & padding[:, None, None]


def _running_count(valid: Tensor) -> Tensor:
    """``[B, T + 1]`` int64: how many of the first ``n`` are True."""
    return torch.nn.functional.pad(valid.cumsum(-1), (1, 0))
