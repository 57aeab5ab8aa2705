"""Keys and values of a layer: lists of any length, one for each row of the batch and KV head, in one buffer.

A list that shrinks gives its memory back, whatever the others hold; all have the same room to grow in.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Allocate = Callable[[Tensor, int], Tensor]
"""From a tensor and a number of entries to a buffer ``[entries, ...]`` of zeros, of its dtype and for its entries."""

_ROOM, _SHARE = 64, 16


def in_memory(like: Tensor, entries: int) -> Tensor:
    """Zeros ``[entries, ...]`` beside ``like``."""
    return like.new_zeros(entries, *like.shape[1:])


class Store:
    """Lists of keys with their values and positions.

    Attributes:
        keys: ``[N, D]``; list ``(b, h)`` is ``keys[starts[b, h] : starts[b, h] + lengths[b, h]]``.
        values: ``[N, Dv]``.
        positions: ``[N]`` int32, the token of the row that an entry is of; ascending in each list.
        extras: further figures of each entry, ``[N, ...]``, by name; they move with it. A new entry has 0.
        starts: ``[B, H_kv]`` int64.
        lengths: ``[B, H_kv]`` int64.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        """Empty lists, for keys and values like ``key`` and ``value`` ``[B, H_kv, T, D]``."""
        self.keys = key.new_empty(0, key.shape[-1])
        self.values = value.new_empty(0, value.shape[-1])
        self.positions = torch.empty(0, dtype=torch.int32, device=key.device)
        self.extras: dict[str, Tensor] = {}
        self.starts = torch.zeros(key.shape[:2], dtype=torch.int64, device=key.device)
        self.lengths = torch.zeros_like(self.starts)
        self.room = 0
        self.allocate: Allocate = in_memory

    @property
    def longest(self) -> int:
        """Entries of the longest list."""
        return int(self.lengths.max()) if self.lengths.numel() else 0

    @property
    def num_bytes(self) -> int:
        """Memory held, room to grow included; not what lies elsewhere (see `relocate`)."""
        tensors = (self.positions, self.starts, self.lengths, *self.extras.values())
        if self.allocate is in_memory:
            tensors += (self.keys, self.values)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def relocate(self, allocate: Allocate) -> None:
        """Keep keys and values in buffers that ``allocate`` makes, from now on and as they grow."""
        self.allocate = allocate
        self.keys, self.values = (allocate(old, len(old)).copy_(old) for old in (self.keys, self.values))

    def append(self, key: Tensor, value: Tensor, position: int) -> None:
        """Put ``T`` tokens, ``[B, H_kv, T, D]``, the first of them at ``position``, at the end of every list."""
        tokens = key.shape[2]
        if tokens > self.room:
            self._move(self._all(), self.lengths, tokens + max(_ROOM, self.longest // _SHARE))
        within = torch.arange(tokens, device=key.device)
        at = ((self.starts + self.lengths).unsqueeze(-1) + within).flatten()
        self.keys.index_copy_(0, at, key.detach().reshape(-1, key.shape[-1]))
        self.values.index_copy_(0, at, value.detach().reshape(-1, value.shape[-1]))
        self.positions[at] = (position + within).int().repeat(self.lengths.numel())
        for extra in self.extras.values():
            extra[at] = 0
        self.lengths, self.room = self.lengths + tokens, self.room - tokens

    def keep(self, mask: Tensor, starts: Tensor) -> None:
        """Drop all other entries, and their memory.

        Args:
            mask: ``[B, H_kv, L]`` bool, by place from ``starts`` on; False beyond a list.
            starts: ``[B, H_kv]``.
        """
        kept = (starts.unsqueeze(-1) + torch.arange(mask.shape[-1], device=mask.device))[mask]
        self._move(kept, mask.sum(-1), _ROOM)

    def crop(self, position: int, tokens: int) -> None:
        """Forget the last ``tokens`` tokens, which begin at ``position``, as far as they are still there."""
        place = self.lengths.unsqueeze(-1) - 1 - torch.arange(tokens, device=self.lengths.device)
        late = (place >= 0) & (self.positions[(self.starts.unsqueeze(-1) + place).clamp(min=0)] >= position)
        self.lengths = self.lengths - late.sum(-1)

    def select_rows(self, rows: Tensor) -> None:
        """Rows of the batch by index, some perhaps again and again, others not at all."""
        self.starts, self.lengths = self.starts[rows], self.lengths[rows]
        self._move(self._all(), self.lengths, max(self.room, 1))

    def rectangle(self, source: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
        """Parts of the lists as ``[B, H_kv, longest, ...]``, not copied where all lie equally far apart.

        Args:
            source: ``keys``, ``values``, ``positions`` or one of the ``extras``.
            starts: ``[B, H_kv]``, of the parts.
            lengths: ``[B, H_kv]``; what stands beyond is anything, but finite.
        """
        longest = int(lengths.max()) if lengths.numel() else 0
        flat = starts.flatten()
        step = int(flat[1] - flat[0]) if len(flat) > 1 else longest
        if bool((lengths == longest).all()) and bool((flat.diff() == step).all()):
            stride = (starts.shape[1] * step, step, 1)
            inner = source.stride()[1:]
            shape = (*starts.shape, longest, *source.shape[1:])
            base = int(flat[0]) if len(flat) else 0
            width = source.stride(0)
            strides = (*(x * width for x in stride), *inner)
            return source.as_strided(shape, strides, source.storage_offset() + base * width)
        place = torch.arange(longest, device=source.device)
        inside = place < lengths.unsqueeze(-1)
        taken = source[(starts.unsqueeze(-1) + place).where(inside, 0)]
        return taken.masked_fill(~inside.view(*inside.shape, *[1] * (taken.ndim - 3)), 0)

    def _all(self) -> Tensor:
        """Where every entry lies, list by list."""
        lengths = self.lengths.flatten()
        first = (self.starts.flatten() - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
        return first + torch.arange(len(first), device=lengths.device)

    def _move(self, source: Tensor, lengths: Tensor, room: int) -> None:
        """Bring the entries at ``source``, list by list, to a new buffer where every list can grow by ``room``."""
        flat = lengths.flatten()
        ends = (flat + room).cumsum(0)
        starts = ends - flat - room
        shift = (starts - (flat.cumsum(0) - flat)).repeat_interleave(flat)
        target, total = shift + torch.arange(len(shift), device=shift.device), int(ends[-1]) if len(ends) else 0

        def moved(old: Tensor, allocate: Allocate = in_memory) -> Tensor:
            # Only the room is cleared: what lies beyond a list is read as a number and then left out.
            new = allocate(old, total)
            return new.index_copy_(0, target, old.index_select(0, source)) if len(source) else new

        self.keys, self.values = moved(self.keys, self.allocate), moved(self.values, self.allocate)
        self.positions = moved(self.positions)
        self.extras = {name: moved(extra) for name, extra in self.extras.items()}
        self.starts, self.lengths, self.room = starts.view_as(lengths), lengths, room
