"""Decode attention in C++: each listed row of the cache is read once for all queries that share its head."""

import ctypes

import torch
from torch import Tensor

from .. import native
from ..native import INT, Pointer
from .problem import Problem

PAGE, LENGTH, START = 1, 2, 3


class _Sizes(ctypes.Structure):
    """As in csrc/kernels/decode.cpp."""

    _fields_ = (
        *((name, INT) for name in ("dtype", "batch", "kv_heads", "rows", "queries", "keys", "dim", "value_dim")),
        *((name, INT) for name in ("key_batch", "key_head", "key_row", "value_batch", "value_head", "value_row")),
        *((name, INT) for name in ("pages", "page_size", "page_bytes", "page_batch", "page_head", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


_attend = native.function("decode_attention", *[Pointer] * 10)


def forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> tuple[Tensor, Tensor, int]:
    """``(out [B, H, Tq, Dv], lse [B, H, Tq] float32, code)``.

    The code is 0, or ``PAGE``, ``LENGTH`` or ``START`` where a number is out of range; then no key was read and the
    rest is worthless. A cache is read where it lies as long as the last of its strides is 1.
    """
    batch, heads, queries, dim = query.shape
    _, kv_heads, keys, value_dim = value.shape
    query = query.contiguous()
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    pages, lengths, padding = problem.pages, problem.lengths, problem.padding
    listed = (0, problem.page_size, 0, 0, 0)
    if pages is not None:
        pages = pages.contiguous()
        rows, owners, width = pages.shape
        by_row, by_head = owners * width if rows > 1 else 0, width if owners > 1 else 0
        listed = (width, problem.page_size, pages.element_size(), by_row, by_head)
    out = query.new_empty(batch, heads, queries, value_dim)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    sizes = _Sizes(
        *(native.DTYPES[query.dtype], batch, kv_heads, heads // kv_heads * queries, queries, keys, dim, value_dim),
        *(*key.stride()[:3], *value.stride()[:3], *listed),
        *(problem.window or 0, problem.scale, problem.softcap or 0.0),
    )
    lengths, starts, padding = (None if x is None else x.contiguous() for x in (lengths, problem.starts, padding))
    return out, lse, _attend(query, key, value, pages, lengths, starts, padding, out, lse, sizes)
