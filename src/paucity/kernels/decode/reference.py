"""Decode attention in plain PyTorch: the listed rows of the cache are gathered, then dense attention."""

import math

import torch
from torch import Tensor

from .problem import Problem


def forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """``(out [B, H, Tq, Dv], lse [B, H, Tq])``; a query that sees nothing has output 0 and lse -inf."""
    at, listed = _positions(key, problem)
    rows, keys, values = _rows(query, key), _gather(key, at, listed, problem), _gather(value, at, listed, problem)
    logits, _ = _logits(rows, keys, _visible(query.shape[2], key.shape[2], at, listed, problem), problem)
    lse = logits.logsumexp(-1)
    out = _weights(logits, lse) @ values
    return (
        out.reshape(*query.shape[:3], value.shape[-1]).to(query.dtype),
        lse.reshape(query.shape[:3]).to(_lse_dtype(query)),
    )


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the weights are computed again."""
    at, listed = _positions(key, problem)
    rows, keys, values = _rows(query, key), _gather(key, at, listed, problem), _gather(value, at, listed, problem)
    logits, slope = _logits(rows, keys, _visible(query.shape[2], key.shape[2], at, listed, problem), problem)
    weights = _weights(logits, lse.reshape(logits.shape[:3]).to(logits.dtype))
    grad = _rows(grad_out, key)
    grad_lse = grad_lse.masked_fill(lse == -math.inf, 0.0).reshape(logits.shape[:3])
    inner = (grad * _rows(out, key)).sum(-1) - grad_lse.to(logits.dtype)
    grad_logits = weights * (grad @ values.mT - inner.unsqueeze(-1)) * (problem.scale * slope)
    return (
        (grad_logits @ keys).reshape(query.shape).to(query.dtype),
        _scatter(grad_logits.mT @ rows, at, listed, key, problem),
        _scatter(weights.mT @ grad, at, listed, value, problem),
    )


def num_pairs(query: Tensor, key: Tensor, problem: Problem) -> int:
    """Pairs of a query and a key that it sees, over all heads."""
    at, listed = _positions(key, problem)
    pairs = _visible(query.shape[2], key.shape[2], at, listed, problem).sum()
    return int(pairs) * query.shape[1] // key.shape[1]


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _rows(x: Tensor, key: Tensor) -> Tensor:
    """``[B, Hkv, G * Tq, D]`` in the dtype that everything is summed in."""
    return x.reshape(x.shape[0], key.shape[1], x.shape[1] // key.shape[1] * x.shape[2], x.shape[-1]).to(_lse_dtype(x))


def _positions(key: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Positions of the listed keys, ``[B, Hkv, m]``, and which of them count; the others are at 0."""
    batch, heads, keys = key.shape[:3]
    length = _lengths(keys, problem)
    if problem.pages is None:
        longest = keys if problem.lengths is None else int(problem.lengths.max())
        at = torch.arange(longest, device=key.device).expand(batch, heads, -1)
    else:
        within = torch.arange(problem.page_size, device=key.device)
        pages = problem.pages.long().unsqueeze(-1)
        at = torch.where(pages >= 0, pages * problem.page_size + within, -1).flatten(2).expand(batch, heads, -1)
    listed = (at >= 0) & (at < (length if isinstance(length, int) else length.unsqueeze(-1)))
    at = at.where(listed, 0)
    if problem.padding is not None:
        listed = listed & problem.padding.gather(1, _places(at, keys, problem).flatten(1)).view(at.shape)
    return at, listed


def _lengths(keys: int, problem: Problem) -> Tensor | int:
    """Keys of each list, ``[B, Hkv]``, or of all of them."""
    if problem.lengths is not None:
        return problem.lengths
    return keys if problem.starts is None else keys - problem.starts


def _visible(queries: int, keys: int, at: Tensor, listed: Tensor, problem: Problem) -> Tensor:
    """``[B, Hkv, Tq, m]``: which of the keys each query sees."""
    length = _lengths(keys, problem)
    length = length if isinstance(length, int) else length[..., None, None]
    stands = length + torch.arange(-queries, 0, device=at.device).unsqueeze(-1)
    at = at.unsqueeze(2)
    visible = listed.unsqueeze(2) & (at <= stands)
    return visible if problem.window is None else visible & (at > stands - problem.window)


def _logits(rows: Tensor, keys: Tensor, visible: Tensor, problem: Problem) -> tuple[Tensor, Tensor | float]:
    """Final logits ``[B, Hkv, G * Tq, m]``, -inf where hidden, and the slope of the soft cap."""
    logits: Tensor = rows @ keys.mT * problem.scale
    slope: Tensor | float = 1.0
    if problem.softcap is not None:
        bent = torch.tanh(logits / problem.softcap)
        logits, slope = bent * problem.softcap, 1 - bent.square()
    hidden = ~visible.repeat(1, 1, rows.shape[2] // visible.shape[2], 1)
    return logits.masked_fill(hidden, -math.inf), slope


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))


def _places(at: Tensor, keys: int, problem: Problem) -> Tensor:
    """Where positions of the lists lie in the cache; those that do not count lie anywhere in it."""
    return at if problem.starts is None else (at + problem.starts.unsqueeze(-1)).clamp(max=max(keys - 1, 0))


def _gather(source: Tensor, at: Tensor, listed: Tensor, problem: Problem) -> Tensor:
    """Rows of the cache ``[B, Hkv, m, D]``, 0 for what does not count, whatever the cache holds there."""
    at = _places(at, source.shape[2], problem)
    taken = source.gather(2, at.unsqueeze(-1).expand(-1, -1, -1, source.shape[-1])).to(_lse_dtype(source))
    return taken.masked_fill(~listed.unsqueeze(-1), 0.0)


def _scatter(rows: Tensor, at: Tensor, listed: Tensor, like: Tensor, problem: Problem) -> Tensor:
    """Adds rows at their positions of a cache of zeros."""
    rows = rows.masked_fill(~listed.unsqueeze(-1), 0.0)
    at = _places(at, like.shape[2], problem)
    total = torch.zeros(like.shape, dtype=rows.dtype, device=rows.device)
    return total.scatter_add_(2, at.unsqueeze(-1).expand_as(rows), rows).to(like.dtype)
