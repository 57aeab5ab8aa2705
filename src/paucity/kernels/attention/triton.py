"""The Triton twin of sparse attention, for GPUs (and for Triton's interpreter, where it is only right, not fast).

What a pattern becomes: a `BlockMask` lists of blocks of keys (those that a causal cut or the model's own window hides
from every query are taken out first), `KeyLists` gathered single keys, a `Window` one range of keys, with the sinks as
gathered single keys for the queries that have them outside their window. Blocks may have any size: programs work on
tiles inside them (a last tile is padded, so sizes that are multiples of 64 are best).

``float32`` products follow ``torch.get_float32_matmul_precision()``: exact for "highest", TF32 otherwise.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...ops.formats.block import BlockMask
from ...ops.formats.stripes import KeyLists, Window
from .. import dispatch
from .problem import Problem
from .triton_forward import forward_kernel

_Strides = tuple[int, ...]


@dataclass(frozen=True)
class _Keys:
    """Where the kernels find the keys of a block of queries; lists are ``[B or 1, list heads, blocks of queries]``."""

    q_block: int
    k_block: int
    near: int  # keys in the window of a `Window`
    causal: bool
    is_window: bool
    list_heads: int = 1
    width: int = 0
    counts: Tensor | None = None  # of single keys or of blocks
    positions: Tensor | None = None
    blocks: Tensor | None = None
    partial: Tensor | None = None
    elements: Tensor | None = None

    @property
    def strides(self) -> _Strides:
        """Of the lists, in lists, with 0 along what shares one."""
        if self.counts is None:
            return (0, 0, 0)
        return tuple(0 if size == 1 else self.counts.stride(at) for at, size in enumerate(self.counts.shape))


@dataclass(frozen=True)
class _Tiles:
    """Constants of a launch."""

    m: int
    n: int
    dim: int
    value_dim: int
    warps: int
    stages: int
    precision: str


def forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Sparse attention and the logarithm of its denominators.

    Args:
        query: ``[B, H, Tq, D]`` float32, bfloat16 or float16, any strides.
        key: ``[B, H_kv, Tk, D]``.
        value: ``[B, H_kv, Tk, Dv]``.
        problem: what is computed; checked before.

    Returns:
        ``[B, H, Tq, Dv]`` in the dtype of ``query``, 0 where a query sees no key; ``[B, H, Tq]`` float32, -inf there.
    """
    (batch, heads, q_len, dim), (_, group_heads, kv_len, value_dim) = query.shape, value.shape
    out = torch.empty(batch, heads, q_len, value_dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=query.device)
    query, key, value = _operands(query, key, value)
    tiles = _tiles(query, value_dim, problem)
    keys = _keys(problem, q_len, kv_len, tiles, query.device)
    bias, bias_strides = _bias(problem, batch, heads, q_len, kv_len)
    grid = (triton.cdiv(q_len, keys.q_block) * triton.cdiv(keys.q_block, tiles.m), batch * heads)
    forward_kernel[grid](
        query, key, value, out, lse,
        keys.positions, keys.counts, keys.blocks, keys.counts, keys.partial, keys.elements, _padding(problem), bias,
        query.stride(), key.stride(), value.stride(), out.stride(), bias_strides, keys.strides, keys.width,
        heads, heads // group_heads, keys.list_heads, q_len, kv_len,
        problem.scale, problem.softcap, _window(problem, kv_len), keys.near,
        CAUSAL=keys.causal, RANGE=keys.is_window, Q_BLOCK=keys.q_block, K_BLOCK=keys.k_block,
        D=dim, DV=value_dim, BLOCK_D=tiles.dim, BLOCK_DV=tiles.value_dim, BLOCK_M=tiles.m, BLOCK_N=tiles.n,
        PRECISION=tiles.precision, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out, lse


def _operands(*tensors: Tensor) -> list[Tensor]:
    """The tensors; for the interpreter, whose products take bfloat16 for integers, in float32."""
    widen = dispatch.interprets_triton() and tensors[0].dtype == torch.bfloat16
    return [x.float() if widen else x for x in tensors]


def _tiles(query: Tensor, value_dim: int, problem: Problem, *, backward: bool = False) -> _Tiles:
    """Sizes by the head size: a tile of queries and two of keys and values must fit registers and shared memory.

    Up to 128 dimensions 64 queries and 64 keys and three stages of loads in flight, above that half of it, and float32
    takes half again. Backward keeps two sums and four operands, so it takes half too. Small blocks get small tiles.
    """
    dim, value_dim = (max(16, triton.next_power_of_2(size)) for size in (query.shape[-1], value_dim))
    wide = max(dim, value_dim) * query.element_size() * (2 if backward else 1)
    limit_n = 64 if wide <= 256 else 32 if wide <= 1024 else 16
    limit_m = 64 if wide <= 1024 else 32
    pattern = problem.pattern
    k_block = pattern.k_block if isinstance(pattern, BlockMask) else limit_n
    q_block = limit_m if isinstance(pattern, Window) else pattern.q_block
    fit_m, fit_n = (max(16, triton.next_power_of_2(size)) for size in (q_block, k_block))
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    stages = 3 if wide <= 256 else 2
    return _Tiles(min(limit_m, fit_m), min(limit_n, fit_n), dim, value_dim, 4, stages, precision)


def _keys(problem: Problem, q_len: int, kv_len: int, tiles: _Tiles, device: torch.device) -> _Keys:
    pattern = problem.pattern
    if isinstance(pattern, Window):
        near = min(pattern.window_size, _window(problem, kv_len))
        sinks = min(pattern.num_sinks, kv_len)
        if not sinks or near == problem.window:  # a sink outside the window is outside the model's too
            return _Keys(tiles.m, tiles.n, near, True, True)
        mask = pattern.sink_mask(kv_len, problem.padding).to(device)
        positions = mask.to(torch.uint8).argsort(dim=-1, stable=True)[:, -sinks:].int().contiguous()
        counts = mask.sum(-1, dtype=torch.int32).view(-1, 1, 1)
        return _Keys(tiles.m, tiles.n, near, True, True, 1, sinks, counts, positions)
    if isinstance(pattern, KeyLists):
        positions, counts = pattern.positions.to(device).contiguous(), pattern.counts.to(device, torch.int32)
        heads, width = positions.shape[1], positions.shape[3]
        return _Keys(
            pattern.q_block, tiles.n, 0, problem.causal, False, heads, width, counts.contiguous(), positions
        )
    blocks = pattern.blocks.to(device) & _within_reach(pattern, problem, device)
    indices = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).int()
    partial, elements = pattern.partial, pattern.elements
    if partial is not None and elements is not None and len(elements):
        partial = partial.to(device).int().contiguous()
        elements = elements.to(device).contiguous().view(torch.uint8)
    else:
        partial = elements = None
    counts = blocks.sum(-1, dtype=torch.int32)
    return _Keys(
        pattern.q_block, pattern.k_block, 0, problem.causal, False, blocks.shape[1], blocks.shape[3], counts,
        blocks=indices, partial=partial, elements=elements,
    )  # fmt: skip


def _within_reach(pattern: BlockMask, problem: Problem, device: torch.device) -> Tensor:
    """Blocks with a pair that the causal cut and the model's window leave, bool ``[blocks of queries, of keys]``."""
    offset = pattern.kv_len - pattern.q_len
    first = torch.arange(0, pattern.q_len, pattern.q_block, device=device).unsqueeze(-1) + offset
    start = torch.arange(0, pattern.kv_len, pattern.k_block, device=device)
    last, stop = (first + pattern.q_block).clamp(max=pattern.kv_len), (start + pattern.k_block).clamp(max=pattern.kv_len)
    reach = stop > first - _window(problem, pattern.kv_len) + 1
    return reach & (start < last) if problem.causal else reach


def _window(problem: Problem, kv_len: int) -> int:
    return kv_len if problem.window is None else min(problem.window, kv_len)


def _padding(problem: Problem) -> Tensor | None:
    return None if problem.padding is None else problem.padding.contiguous().view(torch.uint8)


def _bias(problem: Problem, *shape: int) -> tuple[Tensor | None, _Strides]:
    if problem.bias is None:
        return None, (0, 0, 0, 0)
    bias = problem.bias.expand(*shape)
    return bias, bias.stride()
