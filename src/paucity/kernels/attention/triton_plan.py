"""How the Triton twin of sparse attention is launched: keys by pattern, and sizes of tiles."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import triton
from torch import Tensor

from ...ops.formats.block import BlockMask
from ...ops.formats.stripes import KeyLists, Window
from .problem import Problem


@dataclass(frozen=True)
class Keys:
    """Where the kernels find the keys of a block of queries; lists are ``[B or 1, list_heads, blocks of queries]``.

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
        kept: bool ``[..., width]``, the blocks listed.
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
    kept: Tensor | None = None
    partial: Tensor | None = None
    elements: Tensor | None = None

    @classmethod
    def make(cls, problem: Problem, q_len: int, kv_len: int, tiles: "Tiles", device: torch.device) -> Self:
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
        kept = pattern.blocks.to(device) & _within_reach(pattern, problem, device)
        blocks = cls(pattern.q_block, pattern.k_block, 0, problem.causal, kept.shape[1])._with_blocks(kept)
        if pattern.partial is None or pattern.elements is None or not len(pattern.elements):
            return blocks
        partial = pattern.partial.to(device, torch.int32).contiguous()
        elements = pattern.elements.to(device).contiguous().view(torch.uint8)
        return replace(blocks, partial=partial, elements=elements)

    def _with_blocks(self, kept: Tensor) -> Self:
        # The whole width, so that nothing waits for the device to say which list is the longest.
        blocks = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).int().contiguous()
        counts = kept.sum(-1, dtype=torch.int32)
        return replace(self, width=kept.shape[-1], counts=counts, blocks=blocks, kept=kept)

    def by_key(self) -> Self:
        """Blocks of queries by block of keys; a window without its sinks stays as it is."""
        if self.kept is None:
            return replace(self, positions=None, counts=None, width=0)
        partial = None if self.partial is None else self.partial.mT.contiguous()
        return replace(self._with_blocks(self.kept.mT.contiguous()), partial=partial)

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
    def make(cls, query: Tensor, value_dim: int, problem: Problem, *, backward: bool = False) -> Self:
        """By the bytes of a row: what a program holds must fit registers and shared memory of an H100.

        With 4 warps 64 queries and 64 keys of 128 dimensions in 16 bits leave room for three stages of loads. Longer
        rows and backward, which keeps two sums and four operands, take fewer keys, then fewer queries. Small blocks get
        small tiles.
        """
        dim, value_dim = (max(16, triton.next_power_of_2(size)) for size in (query.shape[-1], value_dim))
        row = max(dim, value_dim) * query.element_size() * (2 if backward else 1)
        m, n = (64, 64) if row <= 256 else (64, 32) if row <= 512 else (32, 32) if row <= 1024 else (16, 16)
        pattern = problem.pattern
        if not isinstance(pattern, Window):
            m = min(m, max(16, triton.next_power_of_2(pattern.q_block)))
        if isinstance(pattern, BlockMask):
            n = min(n, max(16, triton.next_power_of_2(pattern.k_block)))
        return cls(m, n, dim, value_dim, 4, 3 if row <= 256 else 2)


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
    def make(cls, query: Tensor, key: Tensor, value: Tensor, problem: Problem, *, backward: bool = False) -> Self:
        """Choose tiles and list keys."""
        tiles = Tiles.make(query, value.shape[3], problem, backward=backward)
        return cls(
            query, key, value, problem, tiles, Keys.make(problem, query.shape[2], key.shape[2], tiles, query.device)
        )

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
            *(problem.scale, problem.softcap, model_window(problem, kv_len), keys.near),
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
