"""How informative the blocks of a text are, by what their tokens do, and which of them stay.

Blocks lie at multiples of the block size from the first token on, padding included; the last one may be shorter. What
padding does counts as nothing.
"""

import torch
from torch import Tensor, nn

from ..checks import check_divides, check_int, check_ndim, check_range, check_shape, check_sparsity

_AT_ONCE = 1 << 18
"""Scores that are there at once."""


def block_informativeness(
    query: Tensor, key: Tensor, block_size: int, *, scale: float, valid: Tensor | None = None
) -> Tensor:
    """The largest score of every pair of blocks that a causal model looks at.

    Args:
        query: ``[B, H, T, D]`` float, positions included.
        key: ``[B, H_kv, T, D]``.
        block_size: tokens in a block; the last block may be shorter.
        scale: factor on the products.
        valid: ``[B, T]`` bool, False for padding, whose scores count as 0.

    Returns:
        ``[B, n, n]`` float32, detached: blocks of queries by blocks of keys, 0 above the diagonal.

    Raises:
        InputError: if the shapes do not fit or ``block_size`` is less than 1.
    """
    check_int("block_informativeness", "block_size", block_size)
    check_ndim("block_informativeness", "query", query, 4)
    batch, heads, length, dim = query.shape
    check_shape("block_informativeness", "key", key, batch, None, length, dim)
    check_divides("block_informativeness", "the heads of key", key.shape[1], heads, "the heads of query")
    query, key = query.detach(), key.detach()
    num_blocks, kv_heads = -(-length // block_size), key.shape[1]
    out = query.new_zeros(batch, num_blocks, num_blocks, dtype=torch.float32)
    position = torch.arange(length, device=query.device)
    step = max(1, _AT_ONCE // max(1, batch * heads * length * block_size)) * block_size
    for first in range(0, length, step):
        last = min(first + step, length)
        rows = query[:, :, first:last].reshape(batch, kv_heads, -1, dim)
        score = (rows @ key[:, :, :last].mT).float().mul_(scale).relu_()
        score = score.view(batch, heads, last - first, last).mean(1)
        score.masked_fill_(position[:last] >= position[first:last, None], 0.0)
        if valid is not None:
            score.mul_(valid[:, first:last, None]).mul_(valid[:, None, :last])
        by_key = _block_max(score, block_size)  # [B, rows, blocks of keys]
        found = _block_max(by_key.mT, block_size).mT
        begin = first // block_size
        out[:, begin : begin + found.shape[1], : found.shape[2]] = found
    return out


def block_totals(pairs: Tensor, valid: Tensor) -> Tensor:
    """What each block has together with all blocks: ``[B, n]`` float32, the mean over the blocks that are there.

    Args:
        pairs: ``[B, n, n]``, 0 above the diagonal, as of `block_informativeness`.
        valid: ``[B, n]`` bool, False for blocks of padding, which have 0.
    """
    both = pairs.sum(1) + pairs.tril(-1).sum(2)
    return both / valid.sum(-1, keepdim=True).clamp(min=1) * valid


def activation_informativeness(activations: Tensor, block_size: int, *, valid: Tensor | None = None) -> Tensor:
    """The largest mean magnitude of a block's tokens: ``[B, n]`` float32, detached.

    Args:
        activations: ``[B, T, I]`` float, what goes into the down projection.
        block_size: tokens in a block; the last block may be shorter.
        valid: ``[B, T]`` bool, False for padding, which counts as 0.

    Raises:
        InputError: if there are other than three dimensions, or ``block_size`` is less than 1.
    """
    check_ndim("activation_informativeness", "activations", activations, 3)
    check_int("activation_informativeness", "block_size", block_size)
    token = activations.detach().abs().mean(-1, dtype=torch.float32)
    return _block_max(token if valid is None else token * valid, block_size)


def valid_blocks(valid: Tensor, block_size: int) -> Tensor:
    """Blocks ``[B, n]`` with a token ``[B, T]`` that is no padding."""
    return _block_max(valid.float(), block_size) > 0


def keep_blocks(score: Tensor, there: Tensor, *, threshold: float = 1.0, sparsity: float | None = None) -> Tensor:
    """Which blocks stay: those that reach a threshold, and in any case the best one of each text.

    Args:
        score: ``[B, n]`` float, not negative.
        there: ``[B, n]`` bool, False for blocks of padding, which never stay.
        threshold: in units of the mean score of the text's blocks.
        sparsity: share of each text's blocks that goes, instead of those below a threshold.

    Returns:
        ``[B, n]`` bool.

    Raises:
        InputError: if the threshold is negative or the sparsity out of range.
    """
    check_range("keep_blocks", "threshold", threshold, 0)
    count = there.sum(-1, keepdim=True)
    score = relative_scores(score, there).masked_fill(~there, -torch.inf)
    if sparsity is None:
        kept = score >= threshold - 1e-6  # a mean of equal scores, rounded, must not drop them all
    else:
        check_sparsity("keep_blocks", sparsity)
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        kept = rank < count - (count * sparsity).round()
    best = torch.zeros_like(kept).scatter_(-1, score.argmax(dim=-1, keepdim=True), True)
    return (kept | best) & there


def relative_scores(score: Tensor, there: Tensor) -> Tensor:
    """Scores ``[B, n]`` in units of the mean over those blocks of the text that are ``there``; 1 where all are 0."""
    mean = score.masked_fill(~there, 0.0).sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mean > 0, score / mean.clamp(min=torch.finfo(score.dtype).tiny), 1.0)


def _block_max(x: Tensor, block_size: int) -> Tensor:
    """Largest value of each block along the last dimension; values are not negative."""
    rest = -x.shape[-1] % block_size
    return nn.functional.pad(x, (0, rest)).view(*x.shape[:-1], -1, block_size).amax(-1)
