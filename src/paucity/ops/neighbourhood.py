"""Neighbourhoods on a grid of tokens: who sees whom, and tiles of the grid that make it blocks.

In each dimension of length ``L`` a query ``i`` sees ``w`` keys around the leader of its group of ``s`` (the stride):

    leader = min(i // s * s + s // 2, L - 1);  start = clamp(leader - w // 2, 0, L - w);  keys [start, start + w)
    causal:  leader = min(i // s * s + s - 1, L - 1);  start = max(leader - w + 1, 0);    keys [start, i]

``s = 1`` is a sliding window, ``s = w`` cuts the dimension into blocks. Dilation ``d`` splits a dimension into ``d``
groups, the positions of equal ``i % d``, and the rule holds inside each, for ``i // d``. A pair is visible if it is in
every dimension. So who sees whom is a product over dimensions, and so is everything here: an interval for each position
of a dimension is all that is ever computed. Tokens are in row-major order of the grid.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import InputTypeError, check_int, fail
from .formats.block import BlockMask

PerDim = int | Sequence[int]


@dataclass(frozen=True)
class Axis:
    """One dimension of a grid and its neighbourhoods.

    Attributes:
        length: tokens along it.
        window_size: keys that a query sees along it, itself included; longer than the dimension sees all of it.
        stride: queries that share a window.
        dilation: distance between neighbours.
        causal: whether later keys are hidden.
    """

    length: int
    window_size: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def bounds(self) -> tuple[Tensor, Tensor]:
        """First key, and one after the last, that each position sees: int64 ``[length]``, counted in its group."""
        place = torch.arange(self.length)
        group, index = place % self.dilation, place // self.dilation
        size = (self.length - group + self.dilation - 1) // self.dilation
        first = index // self.stride * self.stride
        if self.causal:
            leader = torch.minimum(first + self.stride - 1, size - 1)
            return (leader - self.window_size + 1).clamp(min=0), index + 1
        leader = torch.minimum(first + self.stride // 2, size - 1)
        start = (leader - self.window_size // 2).clamp(min=0)
        start = torch.minimum(start, (size - self.window_size).clamp(min=0))
        return start, torch.minimum(start + self.window_size, size)

    def mask(self) -> Tensor:
        """Who sees whom along the dimension: bool ``[length, length]``."""
        return self.sees(torch.arange(self.length))

    def sees(self, place: Tensor, key: Tensor | None = None) -> Tensor:
        """Whether the positions ``place`` ``[n]`` see those of ``key`` ``[m]``, by default all: bool ``[n, m]``."""
        start, stop = (end[place].unsqueeze(-1) for end in self.bounds())
        key = torch.arange(self.length) if key is None else key
        group, index = key % self.dilation, key // self.dilation
        return ((place % self.dilation).unsqueeze(-1) == group) & (start <= index) & (index < stop)

    def slots(self, tile: int) -> tuple[Tensor, Tensor]:
        """The dimension in tiles of ``tile`` positions of one dilation group each, the last of a group maybe short.

        Returns:
            The slot of each position, int64 ``[length]``, and the position in each, ``[tiles * tile]``, -1 if none.
        """
        place = torch.arange(self.length)
        groups = torch.arange(min(self.dilation, self.length))
        tiles = -(-((self.length - groups + self.dilation - 1) // self.dilation) // tile)
        base = (tiles.cumsum(0) - tiles) * tile
        slot = base[place % self.dilation] + place // self.dilation
        position = torch.full((int(tiles.sum()) * tile,), -1)
        position[slot] = place
        return slot, position


@dataclass(frozen=True)
class AxisPairs:
    """Tiles of queries and tiles of keys along one dimension, and the distinct ways in which one sees another.

    Attributes:
        some: bool ``[query tiles, key tiles]``, whether any pair is visible.
        every: bool, whether all are, as far as there are queries.
        kind: int64, the entry of ``elements``, where any is visible.
        elements: bool ``[kinds, q_tile, k_tile]``.
    """

    some: Tensor
    every: Tensor
    kind: Tensor
    elements: Tensor


def axis_pairs(axis: Axis, q_tile: int, k_tile: int) -> AxisPairs:
    """What tiles of ``q_tile`` queries see of tiles of ``k_tile`` keys along one dimension."""
    low, high, there, num_slots = _reach(axis, q_tile, k_tile)
    low, high, there = low.unsqueeze(-1), high.unsqueeze(-1), there.unsqueeze(-1)
    begin = torch.arange(0, num_slots, k_tile)
    some = (there & (low < begin + k_tile) & (high > begin)).any(1)
    every = (~there | ((low <= begin) & (high >= begin + k_tile))).all(1)
    i, j = some.nonzero(as_tuple=True)
    ends = torch.cat([low[i, :, 0], high[i, :, 0]], dim=1) - begin[j].unsqueeze(1)
    ends, kinds = torch.unique(ends.clamp(0, k_tile), dim=0, return_inverse=True)
    kind = torch.zeros(some.shape, dtype=torch.int64)
    kind[i, j] = kinds
    inside = torch.arange(k_tile)
    return AxisPairs(some, every, kind, (inside >= ends[:, :q_tile, None]) & (inside < ends[:, q_tile:, None]))


def count_tile_pairs(axis: Axis, q_tile: int, k_tile: int) -> tuple[int, int]:
    """Of the maps of `axis_pairs` how many entries are visible, and how many of them as a whole; no map is made."""
    low, high, there, _ = _reach(axis, q_tile, k_tile)
    # Neighbours in a tile see intervals that meet, for a stride is not longer than its window.
    far = int(high.max())
    some = -(-high.amax(1) // k_tile) - low.masked_fill(~there, far).amin(1) // k_tile
    every = high.masked_fill(~there, far).amin(1) // k_tile + -low.amax(1) // k_tile
    return int(some.sum()), int(every.clamp(min=0).sum())


def _reach(axis: Axis, q_tile: int, k_tile: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """First slot of keys, and one after the last, of each query of each tile, which there are, and slots of keys."""
    slot, position = axis.slots(k_tile)
    base = slot - torch.arange(axis.length) // axis.dilation
    q_slot, q_position = axis.slots(q_tile)
    low, high = torch.zeros(2, len(q_position), dtype=torch.int64)
    start, stop = axis.bounds()
    low[q_slot], high[q_slot] = base + start, base + stop
    return low.view(-1, q_tile), high.view(-1, q_tile), (q_position >= 0).view(-1, q_tile), len(position)


@dataclass(frozen=True)
class Tiled:
    """A grid in tiles, and the neighbourhoods as blocks of these.

    Attributes:
        query_order: int64 ``[query slots]``, the token in each slot, -1 where a tile is short.
        key_order: the same for keys.
        query_slot: int64 ``[T]``, the slot of each token.
        pattern: block of queries ``i``, block of keys ``j``: those slots; exact, to be used without causality.
    """

    query_order: Tensor
    key_order: Tensor
    query_slot: Tensor
    pattern: BlockMask


@functools.lru_cache(maxsize=16)
def tiled_neighbourhood(
    axes: tuple[Axis, ...], q_tile: tuple[int, ...], k_tile: tuple[int, ...], num_global: int = 0
) -> Tiled:
    """The neighbourhoods of a grid as blocks of tiles, without a mask of ``T * T`` entries; the last few are kept.

    Args:
        axes: the dimensions, as `grid_axes` gives them.
        q_tile: tokens of a tile of queries along each dimension; a block has as many as their product.
        k_tile: the same for keys.
        num_global: tokens before the grid that see everything and are seen by all, in tiles of their own.
    """
    tiled = _tiled(axes, q_tile, k_tile)
    return _with_global(tiled, num_global) if num_global else tiled


def _tiled(axes: tuple[Axis, ...], q_tile: tuple[int, ...], k_tile: tuple[int, ...]) -> Tiled:
    pairs = [axis_pairs(*one) for one in zip(axes, q_tile, k_tile, strict=True)]
    shapes = tuple(axis.length for axis in axes)
    query_order, key_order = (
        _order(shapes, [axis.slots(size)[1].view(-1, size) for axis, size in zip(axes, tile, strict=True)])
        for tile in (q_tile, k_tile)
    )
    some, every = (functools.reduce(_outer_and, maps) for maps in ([p.some for p in pairs], [p.every for p in pairs]))
    where = some & ~every
    query_slot = torch.empty(math.prod(shapes), dtype=torch.int64)
    there = query_order >= 0
    query_slot[query_order[there]] = there.nonzero().squeeze(-1)
    sizes = (math.prod(q_tile), math.prod(k_tile), len(query_order), len(key_order))
    if not where.any():
        return Tiled(query_order, key_order, query_slot, BlockMask(some[None, None], *sizes))
    kinds = functools.reduce(_outer_kind, pairs[1:], pairs[0].kind)[where]
    used, entry = torch.unique(kinds, return_inverse=True)
    elements = torch.ones(len(used), 1, 1, dtype=torch.bool)
    for number, pair in enumerate(pairs):
        after = math.prod(len(p.elements) for p in pairs[number + 1 :])
        mine = pair.elements[used // after % len(pair.elements)]
        elements = (elements[:, :, None, :, None] & mine[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
    partial = torch.full(some.shape, -1, dtype=torch.int32).masked_scatter(where, entry.int())
    pattern = BlockMask(some[None, None], *sizes, partial[None, None], elements)
    return Tiled(query_order, key_order, query_slot, pattern)


def _with_global(tiled: Tiled, count: int) -> Tiled:
    grid = tiled.pattern
    own = torch.arange(count)
    query_front, key_front = (
        torch.nn.functional.pad(own, (0, -count % block), value=-1) for block in (grid.q_block, grid.k_block)
    )
    query_order, key_order = (
        torch.cat([front, torch.where(order < 0, -1, order + count)])
        for front, order in ((query_front, tiled.query_order), (key_front, tiled.key_order))
    )
    rows, columns = len(query_front) // grid.q_block, len(key_front) // grid.k_block
    blocks = torch.nn.functional.pad(grid.blocks, (columns, 0, rows, 0), value=True)
    # What is seen as a whole is so up to the keys that a short tile lacks.
    real = (key_order >= 0).view(-1, grid.k_block)
    short = torch.where(real.all(-1), -1, (~real.all(-1)).cumsum(0) - 1).int()
    elements = real[~real.all(-1)].unsqueeze(1).expand(-1, grid.q_block, -1)
    partial = short.expand_as(blocks).clone()
    if grid.partial is not None and grid.elements is not None:
        partial[..., rows:, columns:] = torch.where(grid.partial < 0, -1, grid.partial + len(elements))
        elements = torch.cat([elements, grid.elements])
    else:
        partial[..., rows:, columns:] = -1
    sizes = (grid.q_block, grid.k_block, len(query_order), len(key_order))
    pattern = BlockMask(blocks, *sizes, partial, elements) if len(elements) else BlockMask(blocks, *sizes)
    return Tiled(query_order, key_order, torch.cat([own, len(query_front) + tiled.query_slot]), pattern)


def _outer_and(outer: Tensor, inner: Tensor) -> Tensor:
    """Maps over tiles of some dimensions and of one more: ``[n * a, m * b]``."""
    return (outer[:, None, :, None] & inner[None, :, None, :]).flatten(2, 3).flatten(0, 1)


def _outer_kind(outer: Tensor, pair: AxisPairs) -> Tensor:
    both = outer[:, None, :, None] * len(pair.elements) + pair.kind[None, :, None, :]
    return both.flatten(2, 3).flatten(0, 1)


def _order(shape: Sequence[int], axes: Sequence[Tensor]) -> Tensor:
    """Tokens tile by tile; ``axes`` are positions ``[tiles, tile]`` of each dimension, -1 for none."""
    order = torch.zeros(1, 1, dtype=torch.int64)
    for length, position in zip(shape, axes, strict=True):
        wide, here = order[:, None, :, None], position[None, :, None, :]
        order = torch.where((wide < 0) | (here < 0), -1, wide * length + here).flatten(2, 3).flatten(0, 1)
    return order.flatten()


def grid_axes(
    function: str,
    shape: Sequence[int],
    window_size: PerDim,
    stride: PerDim = 1,
    dilation: PerDim = 1,
    causal: bool | Sequence[bool] = False,
) -> tuple[Axis, ...]:
    """The dimensions of a grid; a single value holds for all of them.

    Raises:
        InputError: in the name of ``function``, if there are not 1 to 3 dimensions, a value is less than 1, one per
            dimension is not given, or a stride is longer than its window (some keys would be seen by nobody).
    """
    if not 1 <= len(shape) <= 3:
        raise fail(function, "shape", "have 1 to 3 dimensions", list(shape))
    columns = []
    for name, given in (("shape", shape), ("window_size", window_size), ("stride", stride), ("dilation", dilation)):
        values = [given] * len(shape) if isinstance(given, int) else list(given)
        if len(values) != len(shape):
            raise fail(function, name, f"have {len(shape)} values, like shape", values)
        for one in values:
            check_int(function, name, one)
        columns.append(values)
    flags = [causal] * len(shape) if isinstance(causal, bool) else list(causal)
    if len(flags) != len(shape):
        raise fail(function, "causal", f"have {len(shape)} values, like shape", flags)
    if not all(isinstance(flag, bool) for flag in flags):
        raise InputTypeError(f"{function}: causal must be True or False in each dimension, got {flags}.")
    for size, step in zip(columns[1], columns[2], strict=True):
        if step > size:
            raise fail(function, "stride", f"be at most window_size ({size})", step)
    return tuple(Axis(*one) for one in zip(*columns, flags, strict=True))


def neighbourhood_mask(
    shape: Sequence[int],
    window_size: PerDim,
    *,
    stride: PerDim = 1,
    dilation: PerDim = 1,
    causal: bool | Sequence[bool] = False,
) -> Tensor:
    """Who sees whom, bool ``[T, T]`` with ``T`` the product of ``shape``: for small grids, and to test the rest by.

    Raises:
        InputError: as `grid_axes`.
    """
    axes = grid_axes("neighbourhood_mask", shape, window_size, stride, dilation, causal)
    return functools.reduce(_outer_and, [axis.mask() for axis in axes])
