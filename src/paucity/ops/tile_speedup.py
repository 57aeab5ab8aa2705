"""What neighbourhoods on a grid can gain: an analytical bound for every shape of tiles, and the best shape.

Paper: Hassani et al. 2025, https://arxiv.org/abs/2504.16922, Sec. 3: time is taken to be proportional to the pairs of
tiles that are visited. Only tiles of the grid are simulated (the paper's multi-dimensional tiling); a tile of one row
of tokens, such as ``(1, 1, 64)``, is the nearest to its single-dimensional tiling.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import check_int, fail
from .neighbourhood import Axis, PerDim, count_tile_pairs, grid_axes


@dataclass(frozen=True)
class Speedup:
    """What sparsity can gain over dense attention, if time were proportional to what is computed.

    Attributes:
        flops: pairs of a query and a key of dense attention over those that are visible.
        tiles: pairs of tiles of dense attention over those visited, the bound that a tiled kernel can reach.
        masked: share of the visited pairs of tiles that need an element mask.
        perfect: whether tiles waste nothing, so that both are equal ("perfectly block-sparse").
    """

    flops: float
    tiles: float
    masked: float
    perfect: bool


def simulate_speedup(
    shape: Sequence[int],
    window_size: PerDim,
    *,
    q_tile: Sequence[int],
    k_tile: Sequence[int],
    stride: PerDim = 1,
    dilation: PerDim = 1,
    causal: bool | Sequence[bool] = False,
) -> Speedup:
    """The bound for a choice of tiles, counted for each dimension alone.

    Args:
        shape: of the grid.
        window_size: as in `neighbourhood_mask`, like the three below.
        q_tile: tokens of a tile of queries along each dimension.
        k_tile: the same for keys.
        stride: as there.
        dilation: as there.
        causal: as there.

    Raises:
        InputError: as `grid_axes`, and if a tile is not of as many dimensions.
    """
    name = "simulate_speedup"
    axes = grid_axes(name, shape, window_size, stride, dilation, causal)
    for argument, tile in (("q_tile", q_tile), ("k_tile", k_tile)):
        check_tile(name, argument, tile, axes)
    return _speedup(axes, tuple(q_tile), tuple(k_tile))


def check_tile(function: str, argument: str, tile: Sequence[int], axes: Sequence[Axis]) -> None:
    """Raise InputError unless ``tile`` has a size of at least 1 for each dimension."""
    if len(tile) != len(axes):
        raise fail(function, argument, f"have {len(axes)} sizes, like shape", list(tile))
    for size in tile:
        check_int(function, argument, size)


def _speedup(axes: tuple[Axis, ...], q_tile: tuple[int, ...], k_tile: tuple[int, ...]) -> Speedup:
    counts = [_axis_counts(*one) for one in zip(axes, q_tile, k_tile, strict=True)]
    pairs, visited, whole = (math.prod(column) for column in zip(*counts, strict=True))
    tokens, area = math.prod(axis.length for axis in axes), math.prod(q_tile) * math.prod(k_tile)
    dense = -(-tokens // math.prod(q_tile)) * -(-tokens // math.prod(k_tile))
    return Speedup(tokens**2 / pairs, dense / visited, 1 - whole / visited, visited * area == pairs)


@functools.lru_cache(maxsize=4096)
def _axis_counts(axis: Axis, q_tile: int, k_tile: int) -> tuple[int, int, int]:
    """Along a dimension: visible pairs, pairs of tiles visited, and those of them that are visible as a whole."""
    start, stop = axis.bounds()
    return int((stop - start).sum()), *count_tile_pairs(axis, q_tile, k_tile)


@functools.lru_cache(maxsize=256)
def best_tiles(axes: tuple[Axis, ...], q_block: int = 64, k_block: int = 64) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of tiles of ``q_block`` queries and ``k_block`` keys with the highest bound, then the fewest masks.

    Of equal ones the first is taken, in ascending order of the sizes: longest along the last dimension.
    """
    best: tuple[float, float] = (-math.inf, 0.0)
    chosen: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    for both in itertools.product(factorings(q_block, len(axes)), factorings(k_block, len(axes))):
        found = _speedup(axes, *both)
        if (found.tiles, -found.masked) > best:
            best, chosen = (found.tiles, -found.masked), both
    assert chosen is not None
    return chosen


def factorings(number: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write ``number`` as a product of ``parts`` ordered factors, ascending.

    Examples:
        >>> factorings(4, 2)
        [(1, 4), (2, 2), (4, 1)]
    """
    if parts == 1:
        return [(number,)]
    firsts = [size for size in range(1, number + 1) if number % size == 0]
    return [(size, *rest) for size in firsts for rest in factorings(number // size, parts - 1)]
