"""Keys and values of a layer: lists of any length, one for each row of the batch and KV head, in one buffer.

A list that shrinks gives its memory back, whatever the others hold; all have the same room to grow in.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .packed import Packed

Allocate = Callable[[Tensor, int], Tensor]
"""From a tensor and a number of entries to a buffer ``[entries, ...]`` of zeros, of its dtype and for its entries."""

_ROOM, _SHARE = 16, 32


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
        recent: ``[B, H, n, D]``, queries of the newest tokens, where `remember` was asked for them.
        packed: older entries in few bits, before those of the lists; None where there are none.
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
        self.recent: Tensor | None = None
        self.packed: Packed | None = None

    @property
    def longest(self) -> int:
        """Entries of the longest list."""
        return int(self.lengths.max()) if self.lengths.numel() else 0

    @property
    def num_entries(self) -> Tensor:
        """``[B, H_kv]`` int64, packed ones included."""
        return self.lengths if self.packed is None else self.lengths + self.packed.lengths

    @property
    def num_bytes(self) -> int:
        """Memory held, room to grow included; not what lies elsewhere (see `relocate`)."""
        tensors = [self.positions, self.starts, self.lengths, *self.extras.values()]
        tensors += [self.keys, self.values] if self.allocate is in_memory else []
        tensors += [] if self.recent is None else [self.recent]
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return held + (0 if self.packed is None else self.packed.num_bytes)

    def remember(self, query: Tensor, count: int) -> Tensor:
        """Queries ``[B, H, n, D]`` of the newest tokens: all of ``query``, and ``count`` of them are kept for later."""
        known = query if self.recent is None else torch.cat([self.recent, query], dim=2)
        self.recent = known[:, :, -count:].clone()
        return known[:, :, -max(count, query.shape[2]) :]

    def relocate(self, allocate: Allocate) -> None:
        """Keep keys and values in buffers that ``allocate`` makes, from now on and as they grow."""
        self.allocate = allocate
        self.keys, self.values = (allocate(old, len(old)).copy_(old) for old in (self.keys, self.values))

    def append(self, key: Tensor, value: Tensor, position: int) -> None:
        """Put ``T`` tokens, ``[B, H_kv, T, D]``, the first of them at ``position``, at the end of every list."""
        tokens = key.shape[2]
        # A buffer from inference mode cannot be written to outside.
        if tokens > self.room or (self.keys.is_inference() and not torch.is_inference_mode_enabled()):
            self._move(self._all(), self.lengths, tokens + max(_ROOM, self.longest // _SHARE))
        at = (self.starts + self.lengths).flatten()
        if tokens == 1:
            self.positions.index_fill_(0, at, position)
        else:
            within = torch.arange(tokens, dtype=torch.int32, device=key.device)
            at = (at.unsqueeze(-1) + within).flatten()
            self.positions.index_copy_(0, at, (position + within).repeat(self.lengths.numel()))
        self.keys.index_copy_(0, at, key.detach().reshape(-1, key.shape[-1]))
        self.values.index_copy_(0, at, value.detach().reshape(-1, value.shape[-1]))
        for extra in self.extras.values():
            extra.index_fill_(0, at, 0)
        self.lengths, self.room = self.lengths + tokens, self.room - tokens

    def keep(self, mask: Tensor, starts: Tensor) -> None:
        """Drop all other entries, and their memory.

        Args:
            mask: ``[B, H_kv, L]`` bool, by place from ``starts`` on; False beyond a list.
            starts: ``[B, H_kv]``.
        """
        kept = (starts.unsqueeze(-1) + torch.arange(mask.shape[-1], device=mask.device))[mask]
        self._move(kept, mask.sum(-1), _ROOM)

    def pack(self, bits: int, group_size: int, num_recent: int) -> None:
        """Keep the first entries of each list in ``bits``, whole groups of them; the last ``num_recent`` stay as is."""
        counts = (self.lengths - num_recent).clamp(min=0) // group_size * group_size
        if not counts.any():
            return
        at = _places(self.starts, counts).view(-1, group_size)
        extras = {name: extra[at] for name, extra in self.extras.items()}
        packed = Packed.of(self.keys[at], self.values[at], self.positions[at], extras, counts, bits)
        self._move(_places(self.starts + counts, self.lengths - counts), self.lengths - counts, _ROOM)
        self.packed = packed

    def unpack(self) -> None:
        """Bring back what was packed, with the error of its few bits."""
        packed, self.packed = self.packed, None
        if packed is None:
            return
        keys, values = packed.entries(torch.arange(len(packed.parts[0]), device=self.keys.device))
        old, lengths = packed.lengths, packed.lengths + self.lengths
        within = _places(torch.zeros_like(lengths), lengths)
        counts, num_packed = lengths.flatten(), len(packed.parts[0]) * packed.group_size
        first = (packed.starts * packed.group_size).flatten().repeat_interleave(counts)
        later = (num_packed + self.starts - old).flatten().repeat_interleave(counts)
        source = within + torch.where(within < old.flatten().repeat_interleave(counts), first, later)
        self.keys = torch.cat([keys.flatten(0, 1), self.keys])
        self.values = torch.cat([values.flatten(0, 1), self.values])
        self.positions = torch.cat([packed.parts[-1].flatten(), self.positions])
        for name, extra in self.extras.items():
            before = packed.extras.get(name, extra.new_zeros(keys.shape[:2]))
            self.extras[name] = torch.cat([before.flatten(), extra])
        self._move(source, lengths, _ROOM)

    def crop(self, position: int, tokens: int) -> None:
        """Forget the last ``tokens`` tokens, which begin at ``position``, as far as they are still there."""
        if self.packed is not None:
            self.unpack()
        if self.recent is not None:
            self.recent = self.recent[:, :, : max(0, self.recent.shape[2] - tokens)]
        place = self.lengths.unsqueeze(-1) - 1 - torch.arange(tokens, device=self.lengths.device)
        late = (place >= 0) & (self.positions[(self.starts.unsqueeze(-1) + place).clamp(min=0)] >= position)
        self.lengths = self.lengths - late.sum(-1)

    def select_rows(self, rows: Tensor) -> None:
        """Rows of the batch by index, some perhaps again and again, others not at all."""
        self.starts, self.lengths = self.starts[rows], self.lengths[rows]
        self.recent = None if self.recent is None else self.recent[rows]
        self.packed = None if self.packed is None else self.packed.select_rows(rows)
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
        return _places(self.starts, self.lengths)

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


def _places(starts: Tensor, lengths: Tensor) -> Tensor:
    """``starts`` and what follows, as many as ``lengths`` says, list by list, in one row."""
    flat = lengths.flatten()
    first = (starts.flatten() - (flat.cumsum(0) - flat)).repeat_interleave(flat)
    return first + torch.arange(len(first), device=flat.device)
