"""The operator ``paucity::tree_select``: shapes, dispatch, cost."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from . import spans as shared


@torch.library.custom_op("paucity::tree_select", mutates_args=())
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
    """Positions and counts of key lists; see `reference.tree_select`."""
    if not query.numel():
        empty = _fake(query, key, segments, k_block, q_block, query_stride, num_sinks, window_size, window)
        return empty[0].fill_(-1), empty[1].zero_()
    twin = dispatch.module("tree search", query, __package__)
    positions, counts = twin.tree_select(
        query, key, segments, k_block, q_block, query_stride, num_sinks, window_size, window
    )
    return positions, counts


@tree_select.register_fake
def _fake(
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
    lists = (*query.shape[:2], shared.num_blocks(query.shape[2], key.shape[2], q_block))
    width = shared.width(key.shape[2], segments, k_block, q_block, num_sinks, window_size)
    return query.new_empty(*lists, width, dtype=torch.int32), query.new_empty(lists, dtype=torch.int64)


@register_flop_formula(torch.ops.paucity.tree_select, get_raw=True)
def _flops(
    query: Tensor,
    key: Tensor,
    segments: int,
    k_block: int,
    q_block: int,
    query_stride: int,
    num_sinks: int,
    window_size: int,
    window: int,
    **_: object,
) -> int:
    """Multiplications and additions of the scores; segments that are single blocks before others count as split."""
    batch, heads, queries, dim = query.shape
    total = 0
    span = shared.spans(queries, key.shape[2], q_block, num_sinks, window_size, window)
    for first, stop, _, far, near in span.tolist():
        longest = math.ceil(math.ceil((near - far) / k_block) / segments)
        levels = max(0, longest - 1).bit_length()
        total += levels * 2 * segments * k_block * math.ceil((stop - first) / query_stride)
    return 2 * batch * heads * dim * total
