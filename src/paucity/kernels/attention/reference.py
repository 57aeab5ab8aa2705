"""Sparse attention on tiles, in plain PyTorch; what a pattern leaves out is never computed.

Queries go through in blocks. A block takes the keys that its pattern keeps, all heads and rows of the batch in one
product. The definition of the result, on every device and for every float dtype: products in the dtype of the query,
softmax and sums in float32 (float64 for float64).
"""

import torch
from torch import Tensor

from .problem import Problem
from .tiles import Tile, add_columns, add_rows, tiles


def forward(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem, *, need_lse: bool = True
) -> tuple[Tensor, Tensor]:
    """What `Problem` says, and the log of the sum over ``exp(logits)``.

    Args:
        query: ``[B, H, Tq, D]``.
        key: ``[B, H_kv, Tk, D]``.
        value: ``[B, H_kv, Tk, Dv]``.
        problem: checked.
        need_lse: whether the logsumexp is wanted; NaN, and a pass over the logits less, where it is not.

    Returns:
        Out ``[B, H, Tq, Dv]`` in the dtype of ``query``; logsumexp ``[B, H, Tq]`` float32, or float64 of float64.
        A query that sees nothing has 0 and -inf.
    """
    outs, sums = [], []
    blocks = torch.split(query * problem.scale, problem.pattern.q_block, dim=2)
    for rows, tile in zip(blocks, tiles(query, key, value, problem), strict=True):
        prob, lse, _ = _attend(rows, tile, problem.softcap, need_lse)
        outs.append((prob.to(query.dtype) @ tile.values).view(*rows.shape[:3], value.shape[-1]))
        sums.append(lse)
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    *,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key and value in their dtypes, and of the bias in float32 in its shape where it is asked for.

    Args:
        grad_out: ``[B, H, Tq, Dv]``.
        grad_lse: ``[B, H, Tq]``; None is 0.
        query: as in `forward`, like ``key``, ``value`` and ``problem``.
        key: see there.
        value: see there.
        out: what `forward` returned.
        lse: not read: the tiles are computed again.
        problem: see there.
        bias_grad: whether the gradient of the bias is wanted.
    """
    wide = _wide(query)
    batch, heads, queries, dim = query.shape
    delta = (
        (grad_out * out).sum(-1, dtype=wide) if grad_lse is None else (grad_out * out).sum(-1, dtype=wide) - grad_lse
    )
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (key, value))
    bias, grad_bias = problem.bias, None
    if bias is not None and bias_grad:
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device)
    first = 0
    for tile in tiles(query, key, value, problem):
        stop = min(first + problem.pattern.q_block, queries)
        here, first = slice(first, stop), stop
        rows = query[:, :, here] * problem.scale
        prob, tile_lse, slope = _attend(rows, tile, problem.softcap, need_lse=True)
        long = (
            batch,
            tile.keys.shape[1],
            heads // tile.keys.shape[1] * (stop - here.start),
        )  # the rows of all heads that share keys
        grad_rows = grad_out[:, :, here].reshape(*long, grad_out.shape[-1])
        # A query that sees nothing has no gradient, whatever is asked of its logsumexp.
        minus = delta[:, :, here].masked_fill(tile_lse == -torch.inf, 0.0)
        grad_score = prob * ((grad_rows @ tile.values.mT).to(wide) - minus.reshape(*long, 1))
        if grad_bias is not None:
            by_head = grad_score.view(batch, heads, stop - here.start, -1)
            all_rows = grad_bias.shape[2] == 1
            by_head = by_head.sum(2, keepdim=True) if all_rows else by_head
            add_columns(grad_bias if all_rows else grad_bias[:, :, here], by_head, tile)
        if slope is not None:
            grad_score = grad_score * slope
        low = grad_score.to(query.dtype)
        grad_query[:, :, here] = (low @ tile.keys).view(batch, heads, stop - here.start, dim) * problem.scale
        add_rows(grad_key, low.mT @ rows.reshape(*long, dim), tile)
        add_rows(grad_value, prob.to(query.dtype).mT @ grad_rows, tile)
    if grad_bias is not None and wide == torch.float64:
        return grad_query, grad_key, grad_value, grad_bias
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_bias


def _attend(query: Tensor, tile: Tile, softcap: float | None, need_lse: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights ``[B, heads, rows of all heads that share keys, n]``, logsumexp, slope of the soft cap."""
    batch, heads, rows, dim = query.shape
    wide, columns = _wide(query), tile.keys.shape[2]
    score = query.reshape(batch, tile.keys.shape[1], heads // tile.keys.shape[1] * rows, dim) @ tile.keys.mT
    if not columns:
        return score.to(wide), score.new_full((batch, heads, rows), -torch.inf, dtype=wide), None
    slope = None
    if softcap is not None:
        bent = torch.tanh(score.to(wide) / softcap)
        score, slope = bent * softcap, 1 - bent * bent
    by_head = score.view(batch, heads, rows, columns)
    if tile.bias is not None:
        by_head = by_head.to(wide) + tile.bias
    for first, mask in tile.hidden:
        by_head[..., first : first + mask.shape[-1]].masked_fill_(mask, -torch.inf)
    # Where no sum of the weights is asked for, they need no more digits than the product with the values has.
    prob = by_head.softmax(-1, dtype=wide if need_lse else query.dtype)
    lse = prob.new_full(prob.shape[:3], torch.nan, dtype=wide)
    if need_lse:
        lse = by_head.amax(-1).to(wide) - prob.amax(-1).log()  # the largest weight is exp(its logit - logsumexp)
    if prob[..., 0].isnan().any():
        empty = by_head.amax(-1) == -torch.inf
        prob = prob.masked_fill(empty.unsqueeze(-1), 0.0)
        lse = lse.masked_fill(empty, -torch.inf)
    return prob.view(score.shape), lse, slope


def _wide(tensor: Tensor) -> torch.dtype:
    """Where sums are held."""
    return torch.promote_types(tensor.dtype, torch.float32)
