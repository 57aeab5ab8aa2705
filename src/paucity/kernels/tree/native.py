"""The tree search in native code, for float32 and bfloat16; see csrc/kernels/tree_select.cpp."""

import ctypes

import torch
from torch import Tensor

from .. import native
from . import spans as shared

_INT, _ADDRESS = ctypes.c_int64, ctypes.c_void_p


class _Tree(ctypes.Structure):
    """``Tree`` of the C++ file, field by field."""

    _fields_ = (
        *((name, _INT) for name in ("size", "dtype", "batch", "heads", "kv_heads", "queries", "keys", "dim")),
        *((name, _INT * 3) for name in ("query_strides", "key_strides")),
        *((name, _ADDRESS) for name in ("query", "key", "spans")),
        *((name, _INT) for name in ("blocks", "q_block", "query_stride", "segments", "k_block", "window", "width")),
        *((name, _ADDRESS) for name in ("positions", "counts")),
    )


_tree_select = native.function("tree_select", native.Pointer)


def tree_select(
    query: Tensor,
    key: Tensor,
    segments: int,
    k_block: int,
    q_block: int,
    query_stride: int,
    num_sinks: int,
    window_size: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """As in the reference; queries and keys are read where they lie as long as the last of their strides is 1."""
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = query.shape, key.shape
    span = shared.spans(queries, keys, q_block, num_sinks, window_size, window)
    width = shared.width(keys, segments, k_block, q_block, num_sinks, window_size)
    positions = torch.empty(batch, heads, len(span), width, dtype=torch.int32)
    counts = torch.empty(batch, heads, len(span), dtype=torch.int64)
    struct = _Tree(
        *(ctypes.sizeof(_Tree), native.DTYPES[query.dtype], batch, heads, kv_heads, queries, keys, dim),
        *((_INT * 3)(*x.stride()[:3]) for x in (query, key)),
        *(x.data_ptr() for x in (query, key, span)),
        *(len(span), q_block, query_stride, segments, k_block, window, width),
        *(positions.data_ptr(), counts.data_ptr()),
    )
    if _tree_select(struct):
        raise RuntimeError("tree_select: the native library is of another version; build it anew.")
    return positions, counts
