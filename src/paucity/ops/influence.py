"""What the loss loses when one entry of an attention matrix is dropped, to first order in the output.

Without the entry ``(i, j)`` the rest of its row grows by ``1 / (1 - A_ij)``, so that the loss changes by
``A_ij * (sum_n A_in G_in - G_ij) / (1 - A_ij)``, with ``G`` the gradient of the loss with respect to ``A``. As the
output is ``A V``, ``G = dO V^T``: rows are worked out where they are needed, and no ``T * T`` matrix is kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_floating, check_int, check_shape, fail
from .blocks import pool_blocks
from .formats.stripes import causal_mask

_CHUNK = 1 << 23
"""Entries of the attention matrices that are worked out at a time, unless one block of rows has more."""


@torch.no_grad()
def drop_influence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    block_size: int = 64,
    absolute: bool = False,
) -> Tensor:
    """The change of the loss when a single entry is dropped, summed over blocks of entries.

    A key that is the only one that its query sees cannot be dropped and counts 0, as does one beside which the others
    have no mass in the dtype.

    Args:
        query: ``[B, H, T, D]`` float.
        key: ``[B, H_kv, T, D]``, ``H`` a multiple of ``H_kv``.
        value: ``[B, H_kv, T, Dv]``.
        grad: ``[B, H, T, Dv]``, gradient of the loss with respect to the output of the attention.
        scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        window: keys visible to a query, itself included; None is all.
        block_size: queries and keys in a block.
        absolute: sum magnitudes instead.

    Returns:
        ``[B, H, n, n]`` float32 (float64 for float64), ``n = ceil(T / block_size)``; positive where the loss rises.

    Raises:
        InputError: if shapes do not fit.
    """
    name = "drop_influence"
    for what, tensor in (("query", query), ("key", key), ("value", value), ("grad", grad)):
        check_floating(name, what, tensor)
    check_int(name, "block_size", block_size)
    batch, heads, length, dim = query.shape
    groups = key.shape[1]
    check_shape(name, "key", key, batch, groups, length, dim)
    check_shape(name, "value", value, batch, groups, length, None)
    check_shape(name, "grad", grad, batch, heads, length, value.shape[-1])
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_blocks = -(-length // block_size)
    total = torch.zeros(batch, heads, num_blocks, num_blocks, dtype=dtype, device=query.device)
    wide_key, wide_value = key.to(dtype), value.to(dtype)
    rows = max(1, _CHUNK // max(1, batch * heads * length * block_size)) * block_size
    for first in range(0, length, rows):
        last = min(first + rows, length)

        def product(x: Tensor, y: Tensor, first: int = first, last: int = last) -> Tensor:
            taken = x[:, :, first:last].to(dtype).reshape(batch, groups, -1, x.shape[-1])
            return (taken @ y[:, :, :last].mT).view(batch, heads, last - first, last)

        logits = product(query, wide_key).mul_(scale)
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        hidden = ~causal_mask(last - first, last, window=window, device=query.device)
        prob = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
        dropped = _influence_of_rows(prob, product(grad, wide_value))
        if absolute:
            dropped = dropped.abs_()
        by_row = pool_blocks(dropped, block_size, reduce="sum")
        summed = pool_blocks(by_row.mT, block_size, reduce="sum").mT
        at = first // block_size
        total[:, :, at : at + summed.shape[2], : summed.shape[3]] = summed
    return total


def window_influence(
    blocks: Tensor, window_sizes: Sequence[int], *, num_sinks: int = 0, block_size: int = 64, absolute: bool = False
) -> Tensor:
    """The influence of all that a window and sinks leave out of the causal triangle.

    Args:
        blocks: ``[..., n, n]`` of `drop_influence`.
        window_sizes: keys visible, self included; whole blocks.
        num_sinks: keys at the start that stay; whole blocks.
        block_size: of ``blocks``.
        absolute: of every block the magnitude.

    Returns:
        ``[..., sizes]`` float64. A block that the window cuts counts by the share of its pairs that are left out.

    Raises:
        InputError: if a size is not a multiple of ``block_size``.
    """
    for name, size in [("num_sinks", num_sinks), *(("window_sizes", size) for size in window_sizes)]:
        if size % block_size:
            raise fail("window_influence", name, f"be a multiple of block_size ({block_size})", size)
    blocks = blocks.double().abs() if absolute else blocks.double().clone()
    blocks[..., : num_sinks // block_size] = 0
    count = blocks.shape[-1]
    near = torch.stack([blocks.diagonal(-distance, -2, -1).sum(-1) for distance in range(count)], -1)
    beyond = torch.nn.functional.pad(near.flip(-1).cumsum(-1).flip(-1), (0, 2))
    last = torch.tensor([min(size // block_size, count) for size in window_sizes], device=blocks.device)
    # In the block that the window ends in, a query sees the keys after its own place in its block.
    cut = torch.nn.functional.pad(near, (0, 1))[..., last] * (block_size + 1) / (2 * block_size)
    return beyond[..., last + 1] + cut


def _influence_of_rows(prob: Tensor, slope: Tensor) -> Tensor:
    """Influence of every entry of rows ``prob`` (overwritten) whose gradient is ``slope``.

    ``1 - prob`` has no digits left where a row has nearly all its mass on one key. Only the largest entry of a row can
    be there, and of that one the others' mass and slope are summed instead.
    """
    top, where = prob.max(-1, keepdim=True)
    rest = prob.scatter_(-1, where, 0.0)
    rest_mass, rest_slope = rest.sum(-1, keepdim=True), (rest * slope).sum(-1, keepdim=True)
    top_slope = slope.gather(-1, where)
    mean = torch.where(rest_mass > 0, rest_slope / rest_mass, top_slope)
    result = (rest_slope + top * top_slope - slope).mul_(rest).div_(1 - rest)
    return result.scatter_(-1, where, top * (mean - top_slope))
