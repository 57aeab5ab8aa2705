"""The C++ twin; see csrc/kernels/lines.cpp and csrc/kernels/line_scores.cpp."""

import torch
from torch import Tensor

from ..native import DTYPES, FLOAT, INT, Pointer, function
from .op import num_blocks

_lines = function("lines", *[Pointer] * 4, *[INT] * 6)
_scores = function("line_scores", *[Pointer] * 4, FLOAT, FLOAT, *[INT] * 8)


def mass(last: Tensor, key: Tensor, scale: float, softcap: float | None, window: int | None) -> tuple[Tensor, Tensor]:
    """As in the reference, for float32 and bfloat16."""
    (batch, heads, rows, dim), (group_heads, keys) = last.shape, key.shape[1:3]
    vertical, slash = (torch.empty(batch, heads, keys) for _ in range(2))
    if vertical.numel():
        sizes = (batch, heads, group_heads, rows, keys, dim)
        held = last.contiguous(), key.contiguous()
        _scores(*held, vertical, slash, scale, softcap or 0.0, window or 0, *sizes, DTYPES[last.dtype])
    return vertical, slash


def counts(vertical: Tensor, slash: Tensor, num_queries: int, q_block: int) -> Tensor:
    """As in the reference."""
    blocks = num_blocks(vertical.shape[-1], num_queries, q_block)
    found = torch.empty(*vertical.shape[:2], blocks, dtype=torch.int64)
    _run(vertical, slash, found, None, num_queries, q_block, 0)
    return found


def positions(vertical: Tensor, slash: Tensor, counts: Tensor, num_queries: int, q_block: int, width: int) -> Tensor:
    """As in the reference."""
    found = torch.empty(*counts.shape, width, dtype=torch.int32)
    _run(vertical, slash, counts.contiguous(), found, num_queries, q_block, width)
    return found


def _run(
    vertical: Tensor, slash: Tensor, counts: Tensor, found: Tensor | None, num_queries: int, q_block: int, width: int
) -> None:
    if not counts.numel():
        return
    keys = vertical.shape[-1]
    first = (keys - num_queries) // q_block * q_block
    heads = counts.shape[0] * counts.shape[1]
    held = vertical.contiguous(), slash.contiguous()
    _lines(*held, counts, found, heads, keys, counts.shape[2], first, q_block, width)
