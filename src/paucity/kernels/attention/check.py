"""What the attention functions refuse, before any work."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import (
    InputTypeError,
    check_bool,
    check_floating,
    check_int,
    check_ndim,
    check_range,
    check_shape,
    check_tensor,
    fail,
)
from ...ops.formats.block import BlockMask
from ...ops.formats.stripes import KeyLists, Window
from ..dispatch import check_computable, check_devices
from .problem import Pattern, Problem


def default_scale(name: str, query: Tensor) -> float:
    """``1 / sqrt(D)``."""
    check_ndim(name, "query", query, 4)
    return 1 / math.sqrt(query.shape[-1] or 1)


def check_problem(name: str, query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> None:
    """Raise InputError unless all parts fit each other; indices are not read."""
    check_tensors(name, query, key, value)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    check_range(name, "scale", problem.scale, open_low=True, open_high=True)
    if problem.softcap is not None:
        check_range(name, "softcap", problem.softcap, 0, open_low=True, open_high=True)
    if problem.padding is not None:
        check_bool(name, "padding", problem.padding)
        check_shape(name, "padding", problem.padding, batch, keys)
    if problem.window is not None:
        check_int(name, "window", problem.window)
    if not problem.causal and (isinstance(problem.pattern, Window) or problem.window is not None):
        raise fail(name, "causal", "be True with a window", problem.causal)
    if problem.bias is not None:
        check_floating(name, "bias", problem.bias)
        check_ndim(name, "bias", problem.bias, 4)
        check_shape(name, "bias", problem.bias, None, None, None, keys)
        for wanted, size in zip((batch, heads, queries), problem.bias.shape, strict=False):
            if size not in (1, wanted):
                allowed = f"have shape [{batch} or 1, {heads} or 1, {queries} or 1, {keys}]"
                raise fail(name, "bias", allowed, list(problem.bias.shape))
    check_devices(name, query.device, padding=problem.padding, bias=problem.bias)
    _check_pattern(name, query, key, problem.pattern)


def check_tensors(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise InputError unless shapes, dtypes and devices of ``[B, H, T, D]`` tensors fit each other."""
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        check_ndim(name, argument, tensor, 4)
        check_computable(name, argument, tensor)
        if tensor.dtype != query.dtype:
            raise InputTypeError(f"{name}: {argument} must be {query.dtype} like query, got {tensor.dtype}.")
        if tensor.device != query.device:
            raise fail(name, argument, f"be on {query.device} like query", tensor.device)
    batch, heads, queries, dim = query.shape
    check_shape(name, "key", key, batch, None, None, dim)
    check_shape(name, "value", value, batch, key.shape[1], key.shape[2], None)
    if not key.shape[1] or heads % key.shape[1]:
        raise fail(name, "query", f"have a multiple of {key.shape[1]} heads", heads)
    if queries > key.shape[2]:
        raise fail(name, "query", f"be at most as long as key ({key.shape[2]})", queries)


def _check_pattern(name: str, query: Tensor, key: Tensor, pattern: Pattern) -> None:
    (batch, heads, queries, _), (_, group_heads, keys, _) = query.shape, key.shape
    if not isinstance(pattern, Pattern):
        raise InputTypeError(f"{name}: pattern must be a BlockMask, KeyLists or Window, got {type(pattern).__name__}.")
    check_int(name, "pattern.q_block", pattern.q_block)
    if isinstance(pattern, Window):
        check_int(name, "pattern.window_size", pattern.window_size)
        check_int(name, "pattern.num_sinks", pattern.num_sinks, 0)
        if pattern.dropped is not None:
            check_shape(name, "pattern.dropped", pattern.dropped, batch)
            if pattern.dropped.dtype != torch.int64:
                raise InputTypeError(f"{name}: pattern.dropped must be torch.int64, got {pattern.dropped.dtype}.")
            if pattern.dropped.device not in (query.device, torch.device("cpu")):
                raise fail(name, "pattern.dropped", f"be on {query.device}", pattern.dropped.device)
        return
    if isinstance(pattern, KeyLists):
        for part, tensor, dtype in (
            ("positions", pattern.positions, torch.int32),
            ("counts", pattern.counts, torch.int64),
        ):
            check_tensor(name, f"pattern.{part}", tensor)
            if tensor.dtype != dtype:
                raise InputTypeError(f"{name}: pattern.{part} must be {dtype}, got {tensor.dtype}.")
        check_ndim(name, "pattern.positions", pattern.positions, 4)
        check_shape(name, "pattern.counts", pattern.counts, *pattern.positions.shape[:3])
        _check_parts(name, query, positions=pattern.positions, counts=pattern.counts)
    else:
        parts = {"blocks": pattern.blocks, "partial": pattern.partial, "elements": pattern.elements}
        _check_parts(name, query, **parts)
    shape: Sequence[int] = (pattern.positions if isinstance(pattern, KeyLists) else pattern.blocks).shape
    if isinstance(pattern, BlockMask) and (pattern.q_len, pattern.kv_len) != (queries, keys):
        raise fail(name, "pattern", f"be for {queries} queries and {keys} keys", repr(pattern))
    blocks = -(-queries // pattern.q_block)
    if shape[0] not in (1, batch) or shape[1] not in (1, group_heads, heads) or shape[2] != blocks:
        wanted = f"fit {batch} rows, {heads} heads and {blocks} blocks of queries"
        raise fail(name, "pattern", wanted, list(shape[:3]))


def _check_parts(name: str, query: Tensor, **parts: Tensor | None) -> None:
    check_devices(name, query.device, **{f"pattern.{part}": tensor for part, tensor in parts.items()})
