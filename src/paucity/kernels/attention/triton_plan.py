"""How the Triton twin of sparse attention is launched: keys by pattern, and sizes of tiles."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Self

import torch
import triton
from torch import Tensor

from ...ops.formats.block import BlockMask
from ...ops.formats.stripes import KeyLists, Window
from .problem import Problem


class Pass(Enum):
    """Which kernel runs: each holds other sums and operands."""

    FORWARD = "forward"
    QUERIES = "queries"
    KEYS = "keys"


# Largest dimension, queries and keys of a tile, warps, loads in flight. Chosen so that an H100 keeps a program in its
# registers (a product of the tensor cores wants 64 rows for every 4 warps, float32 without them 8 warps) and two
# programs in the shared memory of a multiprocessor.
_Sizes = tuple[tuple[int, int, int, int, int], ...]
_HALF: dict[Pass, _Sizes] = {
    Pass.FORWARD: ((128, 64, 64, 4, 3), (256, 64, 32, 4, 2), (1 << 30, 32, 16, 8, 1)),
    Pass.QUERIES: ((128, 64, 64, 4, 2), (256, 64, 32, 8, 2), (1 << 30, 32, 16, 8, 1)),
    Pass.KEYS: ((64, 64, 64, 4, 2), (256, 32, 64, 8, 2), (1 << 30, 16, 32, 8, 1)),
}
_FULL: dict[Pass, _Sizes] = {
    Pass.FORWARD: ((64, 64, 32, 8, 2), (128, 32, 32, 8, 2), (1 << 30, 16, 16, 8, 1)),
    Pass.QUERIES: ((64, 64, 32, 8, 2), (128, 32, 32, 8, 2), (1 << 30, 16, 16, 8, 1)),
    Pass.KEYS: ((128, 32, 32, 8, 2), (1 << 30, 16, 16, 8, 1)),
}


@dataclass(frozen=True)
class Keys:
    """Where the kernels find the keys of a block of queries; lists are ``[B or 1, list_heads, blocks of queries]``.

    For `Pass.KEYS` blocks are the other way round: the blocks of queries of each block of keys.

    Attributes:
        q_block: queries that share a list.
        k_block: keys in a block.
        near: keys in the window of a `Window`, the model's own taken in; 0 for other patterns.
        causal: whether later keys are hidden.
        list_heads: heads of the lists.
        width: length of a list.
        counts: int32, entries of each list: the last of ``positions``, the first of ``blocks``.
        positions: int32 ``[..., width]``, single keys.
        blocks: int32 ``[..., width]``, blocks of keys.
        partial: int32 ``[..., width]``, as in `BlockMask`.
        elements: uint8, as in `BlockMask`.
    """

    q_block: int
    k_block: int
    near: int
    causal: bool
    list_heads: int = 1
    width: int = 0
    counts: Tensor | None = None
    positions: Tensor | None = None
    blocks: Tensor | None = None
    partial: Tensor | None = None
    elements: Tensor | None = None

    @classmethod
    def make(cls, problem: Problem, q_len: int, kv_len: int, tiles: "Tiles", use: Pass, device: torch.device) -> Self:
        """The keys of the pattern of ``problem``."""
        pattern = problem.pattern
        if isinstance(pattern, Window):
            near = min(pattern.window_size, model_window(problem, kv_len))
            sinks = min(pattern.num_sinks, kv_len)
            window = cls(tiles.m, tiles.n, near, True)
            if not sinks or near == problem.window:  # a sink outside the window is outside the model's too
                return window
            mask = pattern.sink_mask(kv_len, problem.padding).to(device)
            last = mask.to(torch.uint8).argsort(dim=-1, stable=True)[:, -sinks:].int().contiguous()
            counts = mask.sum(-1, dtype=torch.int32).view(-1, 1, 1)
            return replace(window, width=sinks, counts=counts, positions=last.view(-1, 1, 1, sinks))
        if isinstance(pattern, KeyLists):
            positions = pattern.positions.to(device, torch.int32).contiguous()
            counts = pattern.counts.to(device, torch.int32).contiguous()
            heads, width = positions.shape[1], positions.shape[3]
            single = cls(pattern.q_block, tiles.n, 0, problem.causal, heads, width)
            return replace(single, counts=counts, positions=positions)
        kept, partial = pattern.blocks.to(device) & _within_reach(pattern, problem, device), pattern.partial
        if use is Pass.KEYS:
            kept, partial = kept.mT, None if partial is None else partial.mT
        blocks = cls(pattern.q_block, pattern.k_block, 0, problem.causal, kept.shape[1], kept.shape[3])
        # The whole width, so that nothing waits for the device to say which list is the longest.
        lists = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).int().contiguous()
        blocks = replace(blocks, counts=kept.sum(-1, dtype=torch.int32).contiguous(), blocks=lists)
        if partial is None or pattern.elements is None or not len(pattern.elements):
            return blocks
        elements = pattern.elements.to(device).contiguous().view(torch.uint8)
        return replace(blocks, partial=partial.to(device, torch.int32).contiguous(), elements=elements)

    def without_sinks(self) -> Self:
        """The same with blocks or a range only."""
        return replace(self, positions=None, counts=None, width=0) if self.near else self

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the lists, in lists, with 0 along what shares one."""
        if self.counts is None:
            return (0, 0, 0)
        return tuple(0 if size == 1 else self.counts.stride(at) for at, size in enumerate(self.counts.shape))


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles and how a program runs.

    Attributes:
        m: queries.
        n: keys.
        dim: dimensions of a key, padded to a power of two.
        value_dim: dimensions of a value, padded to a power of two.
        warps: warps of a program.
        stages: loads in flight.
    """

    m: int
    n: int
    dim: int
    value_dim: int
    warps: int
    stages: int

    @classmethod
    def make(cls, query: Tensor, value_dim: int, problem: Problem, use: Pass) -> Self:
        """By the dimensions and the dtype; small blocks get small tiles."""
        dim, value_dim = (max(16, triton.next_power_of_2(size)) for size in (query.shape[-1], value_dim))
        sizes = (_FULL if query.dtype == torch.float32 else _HALF)[use]
        _, m, n, warps, stages = next(size for size in sizes if size[0] >= max(dim, value_dim))
        pattern = problem.pattern
        if not isinstance(pattern, Window):
            m = min(m, max(16, triton.next_power_of_2(pattern.q_block)))
        if isinstance(pattern, BlockMask):
            n = min(n, max(16, triton.next_power_of_2(pattern.k_block)))
        return cls(m, n, dim, value_dim, warps, stages)


@dataclass(frozen=True)
class Plan:
    """What all kernels are told."""

    query: Tensor
    key: Tensor
    value: Tensor
    problem: Problem
    tiles: Tiles
    keys: Keys

    @classmethod
    def make(cls, query: Tensor, key: Tensor, value: Tensor, problem: Problem, use: Pass) -> Self:
        """Choose tiles and list keys."""
        tiles = Tiles.make(query, value.shape[3], problem, use)
        keys = Keys.make(problem, query.shape[2], key.shape[2], tiles, use, query.device)
        return cls(query, key, value, problem, tiles, keys)

    @property
    def query_grid(self) -> tuple[int, int]:
        """Tiles of queries, and heads of all rows of the batch."""
        (batch, heads, q_len, _), block = self.query.shape, self.keys.q_block
        return triton.cdiv(q_len, block) * triton.cdiv(block, self.tiles.m), batch * heads

    def arguments(self, keys: Keys | None = None) -> tuple[Any, ...]:
        """From ``positions`` on, in the order of the kernels; with other ``keys`` than those of the pattern."""
        keys, problem = keys or self.keys, self.problem
        (batch, heads, q_len, _), (_, group_heads, kv_len, _) = self.query.shape, self.key.shape
        padding = None if problem.padding is None else problem.padding.contiguous().view(torch.uint8)
        bias = None if problem.bias is None else problem.bias.expand(batch, heads, q_len, kv_len)
        return (
            *(keys.positions, keys.counts, keys.blocks, keys.partial, keys.elements, padding, bias),
            *(self.query.stride(), self.key.stride(), self.value.stride()),
            *((0, 0, 0, 0) if bias is None else bias.stride(), keys.strides, keys.width),
            *(heads, heads // group_heads, keys.list_heads, q_len, kv_len),
            *(float(problem.scale), None if problem.softcap is None else float(problem.softcap)),
            *(model_window(problem, kv_len), keys.near),
        )

    def constants(self, keys: Keys | None = None) -> dict[str, Any]:
        """What a kernel is compiled for.

        ``float32`` products follow ``torch.get_float32_matmul_precision()``: exact for "highest", TF32 otherwise.
        """
        keys, tiles = keys or self.keys, self.tiles
        exact = torch.get_float32_matmul_precision() == "highest"
        sizes = {"Q_BLOCK": keys.q_block, "K_BLOCK": keys.k_block, "BLOCK_M": tiles.m, "BLOCK_N": tiles.n}
        dims = {"D": self.query.shape[3], "DV": self.value.shape[3], "BLOCK_D": tiles.dim, "BLOCK_DV": tiles.value_dim}
        how = {"CAUSAL": keys.causal, "RANGE": keys.near > 0, "PRECISION": "ieee" if exact else "tf32"}
        run = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
        return sizes | dims | how | run


def model_window(problem: Problem, kv_len: int) -> int:
    """The model's own window, at most all keys."""
    return kv_len if problem.window is None else min(problem.window, kv_len)


def _within_reach(pattern: BlockMask, problem: Problem, device: torch.device) -> Tensor:
    """Blocks with a pair that the causal cut and the model's window leave, bool ``[blocks of queries, of keys]``."""
    offset = pattern.kv_len - pattern.q_len
    first = torch.arange(0, pattern.q_len, pattern.q_block, device=device).unsqueeze(-1) + offset
    start = torch.arange(0, pattern.kv_len, pattern.k_block, device=device)
    last, stop = (x.clamp(max=pattern.kv_len) - 1 for x in (first + pattern.q_block, start + pattern.k_block))
    reach = stop > first - model_window(problem, pattern.kv_len)
    return reach & (start <= last) if problem.causal else reach
