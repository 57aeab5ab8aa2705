"""Neighbourhood attention: on a grid of tokens a query sees the keys around it, with strides and dilation.

Paper: Hassani et al. 2025 (Generalized Neighborhood Attention), https://arxiv.org/abs/2504.16922, Sec. 3.1; who sees
whom is in `paucity.ops.neighbourhood`, the gain that a shape of tiles allows in `paucity.ops.tile_speedup`.

`neighbourhood_attention` is for models of images and video, whose tokens all are a grid, with no order. Tokens are laid
out in tiles of the grid, so that blocks of the kernel are tiles (the paper's multi-dimensional tiling with the token
permutation outside the kernel); tiles that are seen in part have an element mask, so that the result is exact. Other
than in the authors' library a window may be longer than its dimension, which then is seen whole, and one shape of tiles
is not tied to the kernel: the simulator chooses it.

`Neighbourhood` is for prompts of language models. Without ``shape`` the text is the one dimension, causal; its length
is not known in advance, so that the leader of the last group of queries is not cut to it. With ``shape``, the tokens
from ``start`` on are a grid in row-major order: they see the text before the grid, and of the grid what is both in
their neighbourhood and not later in the text. Tokens outside the grid see all that came before, or the latest of it.
Blocks of this policy are tokens in succession, not tiles, because of the causal order: in a grid with long rows a block
spans few of them, and of a dilated neighbourhood no block is skipped that its extent touches.
"""

import functools
import math
from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..checks import check_int, fail
from ..kernels.attention import check_tensors, sparse_attention
from ..ops.formats.block import BlockMask
from ..ops.formats.stripes import Window
from ..ops.neighbourhood import Axis, PerDim, grid_axes, tiled_neighbourhood
from ..ops.tile_speedup import best_tiles, check_tile
from .policy import PrefillPolicy
from .prompt import Prompt


def neighbourhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: Sequence[int],
    *,
    window_size: PerDim,
    stride: PerDim = 1,
    dilation: PerDim = 1,
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    tile: Sequence[int] | None = None,
    num_global: int = 0,
) -> Tensor:
    """Attention within the neighbourhoods of a grid, exact and differentiable; work is in proportion to tiles visited.

    Args:
        query: ``[B, H, T, D]``, first the global tokens, then the grid in row-major order.
        key: ``[B, H_kv, T, D]``, ``H`` a multiple of ``H_kv``.
        value: ``[B, H_kv, T, Dv]``.
        shape: of the grid, 1 to 3 dimensions.
        window_size: keys that a query sees along each dimension, itself included; one for all, or one each.
        stride: queries in succession that share a window; equal to ``window_size`` it cuts the grid into blocks.
        dilation: distance between neighbours.
        causal: whether later keys are hidden, along each dimension.
        scale: factor on the logits, ``1 / sqrt(D)`` by default.
        tile: tokens of a tile along each dimension; by default the best of 64 tokens (`paucity.ops.tile_speedup`).
        num_global: tokens in front, as of a caption, that see everything and are seen by all.

    Returns:
        ``[B, H, T, Dv]`` in the dtype of ``query``.

    Raises:
        InputError: if shapes do not fit each other, a stride is longer than its window, or a size is less than 1.
    """
    name = "neighbourhood_attention"
    check_tensors(name, query, key, value)
    check_int(name, "num_global", num_global, 0)
    axes = grid_axes(name, shape, window_size, stride, dilation, causal)
    if tile is not None:
        check_tile(name, "tile", tile, axes)
    length = num_global + math.prod(shape)
    for argument, tensor in (("query", query), ("key", key)):
        if tensor.shape[2] != length:
            raise fail(name, argument, f"have {length} tokens, the grid and the global ones", tensor.shape[2])
    q_tile, k_tile = best_tiles(axes) if tile is None else (tuple(tile), tuple(tile))
    tiled = tiled_neighbourhood(axes, q_tile, k_tile, num_global)
    laid_key, laid_value = (_take(x, tiled.key_order) for x in (key, value))
    pattern = tiled.pattern.to(query.device)
    out = sparse_attention(_take(query, tiled.query_order), laid_key, laid_value, pattern, scale=scale, causal=False)
    return _take(out, tiled.query_slot)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of ``[B, H, T, D]`` in another order, any of them where it says -1; no copy where it is the same."""
    if torch.equal(order, torch.arange(x.shape[2])):
        return x
    batch, heads, length, dim = x.shape
    before = length * torch.arange(batch * heads, device=x.device).unsqueeze(-1)
    index = (before + order.to(x.device).clamp(min=0)).flatten()
    return x.reshape(-1, dim).index_select(0, index).view(batch, heads, -1, dim)  # rows are copied as a whole


class Neighbourhood(PrefillPolicy):
    """Options of ``neighbourhood``. The same for every head and prompt; nothing is looked at.

    Attributes:
        window_size: keys along each dimension; one for all, or one each.
        stride: queries in succession that share a window.
        dilation: distance between neighbours.
        causal: whether later keys are hidden along a dimension of the grid, as along time; the text always is causal.
        shape: of the grid, as frames, rows and columns; None where the text itself is the dimension.
        start: tokens of the text before the grid.
        text_window: latest keys that a token outside the grid sees, itself included; None is all.
        k_block: keys in a block.
    """

    window_size: int | list[int] = 1024
    stride: int | list[int] = 1
    dilation: int | list[int] = 1
    causal: bool | list[bool] = False
    shape: list[int] | None = None
    start: int = Field(0, ge=0)
    text_window: int | None = Field(None, ge=1)
    q_block: int = Field(64, ge=1)
    k_block: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._axes()
        if self.shape is None and (self.start or self.text_window is not None or self.causal is not False):
            raise fail("neighbourhood", "start, text_window and causal", "be left alone without shape", "one of them")
        return self

    def _axes(self) -> tuple[Axis, ...]:
        shape = [1] if self.shape is None else self.shape
        return grid_axes("neighbourhood", shape, self.window_size, self.stride, self.dilation, self.causal)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> BlockMask | Window:
        """The same pattern for every head; of ``query`` and ``key`` only the sizes are looked at."""
        axes = self._axes()
        if self.shape is None and (axes[0].stride, axes[0].dilation) == (1, 1):
            return Window(axes[0].window_size, 0, self.q_block)
        start = None if self.shape is None else self.start
        num_queries, num_keys = query.shape[2], key.shape[2]
        # A block that is longer than the text is the same block.
        sizes = (min(size, max(1, num_keys)) for size in (self.q_block, self.k_block))
        return _pattern(axes, start, self.text_window, *sizes, num_queries, num_keys, prompt.dropped).to(query.device)

    def lookahead(self, length: int) -> int:
        """1: the pattern is fixed."""
        return 1


@functools.lru_cache(maxsize=4)
def _pattern(
    axes: tuple[Axis, ...],
    start: int | None,
    text_window: int | None,
    q_block: int,
    k_block: int,
    num_queries: int,
    num_keys: int,
    dropped: int,
) -> BlockMask:
    """Blocks of tokens in succession, block of queries by block of queries; the last few patterns are kept."""
    first = (num_keys - num_queries) // q_block
    starts = dropped + torch.arange(0, num_keys, k_block)
    rows, tiles = [], []
    for block in range(first, -(-num_keys // q_block)):
        query = dropped + torch.arange(block * q_block, min(num_keys, (block + 1) * q_block))
        if start is None:
            near = starts + k_block > int(_oldest(axes[0], query).min())
        else:
            near = _near(axes, start, text_window, query, starts, k_block)
        near &= starts <= query[-1]
        key = (starts[near].unsqueeze(-1) + torch.arange(k_block)).flatten()
        later = key > query.unsqueeze(-1)
        if start is None:
            seen = (key >= _oldest(axes[0], query).unsqueeze(-1)) & (
                (query.unsqueeze(-1) - key) % axes[0].dilation == 0
            )
        else:
            seen = _in_text(axes, start, text_window, query, key)
        # What causality hides anyway may be kept, so that fewer blocks are partial.
        shape = (len(query), -1, k_block)
        some = (seen & ~later).view(shape).any(2).any(0)
        tile = (seen | later).view(shape).transpose(0, 1)
        every = tile.all(-1).all(-1)
        row = torch.full_like(starts, -1)  # -1 dropped, 0 whole, 1 partial
        row[near] = torch.where(some, (~every).long(), -1)
        rows.append(row)
        tiles.append(torch.nn.functional.pad(tile[some & ~every], (0, 0, 0, q_block - len(query)), value=True))
    kinds, elements = torch.stack(rows)[None, None], torch.cat(tiles)
    lead = (num_keys - num_queries) % q_block
    sizes = (q_block, k_block, num_queries + lead, num_keys)
    if not len(elements):
        return BlockMask(kinds >= 0, *sizes)
    partial = torch.full_like(kinds, -1, dtype=torch.int32)
    partial[kinds == 1] = torch.arange(len(elements), dtype=torch.int32)
    return BlockMask(kinds >= 0, *sizes, partial, elements)


def _oldest(axis: Axis, query: Tensor) -> Tensor:
    """First key that each position of a text sees, whatever its length."""
    group, index = query % axis.dilation, query // axis.dilation
    start = index // axis.stride * axis.stride + axis.stride - axis.window_size
    return start.clamp(min=0) * axis.dilation + group


def _near(
    axes: Sequence[Axis],
    start: int,
    text_window: int | None,
    query: Tensor,
    starts: Tensor,
    k_block: int,
) -> Tensor:
    """Blocks of keys that queries may see, bool as ``starts``, by the first dimension alone."""
    inner = math.prod(axis.length for axis in axes[1:])
    stop = start + axes[0].length * inner
    grid = query[(query >= start) & (query < stop)]
    near = torch.zeros_like(starts, dtype=torch.bool)
    if len(grid) < len(query):
        near |= starts + k_block > (0 if text_window is None else int(query[0]) - text_window + 1)
    if len(grid):
        frames = axes[0].sees(torch.unique((grid - start) // inner)).any(0)
        before = torch.nn.functional.pad(frames.cumsum(0), (1, 0))
        low, high = ((edge - start).clamp(0, stop - start) for edge in (starts, starts + k_block))
        near |= before[-(-high // inner)] > before[low // inner]
        near |= starts < start
    return near


def _in_text(axes: Sequence[Axis], start: int, text_window: int | None, query: Tensor, key: Tensor) -> Tensor:
    """Who sees whom, causality left aside: bool ``[queries, keys]``."""
    total = math.prod(axis.length for axis in axes)
    seen = torch.ones(len(query), len(key), dtype=torch.bool)
    after = total
    for axis in axes:
        after //= axis.length
        mine, theirs = ((at - start).clamp(0, total - 1) // after % axis.length for at in (query, key))
        seen &= axis.sees(mine, theirs)
    seen |= key < start
    outside = ((query < start) | (query >= start + total)).unsqueeze(-1)
    near = torch.ones((), dtype=torch.bool) if text_window is None else key > query.unsqueeze(-1) - text_window
    return torch.where(outside, near, seen)
