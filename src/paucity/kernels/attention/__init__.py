"""Attention over the keys that a pattern keeps."""

from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from ...checks import check_floating, check_shape
from ..dispatch import check_devices
from .check import check_problem, check_tensors, default_scale
from .merge import merge_attention
from .op import flat, sparse_attention_op
from .problem import Pattern, Problem
from .recall import attention_recall
from .tiles import as_key_lists

__all__ = [
    "Pattern",
    "Problem",
    "as_key_lists",
    "attention_recall",
    "check_tensors",
    "merge_attention",
    "sparse_attention",
]


@overload
def sparse_attention(  # noqa: D418
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    padding: Tensor | None = ...,
    window: int | None = ...,
    causal: bool = ...,
    bias: Tensor | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor:
    """Out alone."""


@overload
def sparse_attention(  # noqa: D418
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    padding: Tensor | None = ...,
    window: int | None = ...,
    causal: bool = ...,
    bias: Tensor | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]:
    """Out and logsumexp."""


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    padding: Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(softcap(scale * q k^T) + bias) v`` over the keys that the pattern keeps and that the query may see.

    Differentiable in query, key, value, bias and sinks, and through the logsumexp; not twice. Where the native kernels
    are not there, neither gradients nor the logsumexp are asked for, and the pattern keeps everything, so that tiles
    would lose, it runs as dense attention (`paucity.kernels.dispatch.dense_runs` tells).

    Args:
        query: ``[B, H, Tq, D]`` float, the last ``Tq`` of the ``Tk`` tokens.
        key: ``[B, H_kv, Tk, D]``, ``H`` a multiple of ``H_kv``.
        value: ``[B, H_kv, Tk, Dv]``.
        pattern: which keys a block of queries sees.
        scale: factor on the logits, ``1 / sqrt(D)`` by default.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        padding: ``[B, Tk]`` bool, False where a key is padding.
        window: sliding window of the model: keys visible, self included, on top of the pattern.
        causal: hide keys later than the query. A window always does.
        bias: ``[B or 1, H or 1, Tq or 1, Tk]`` float, added to the logits after the soft cap; -inf hides a key.
        sinks: ``[H]`` float, finite: a logit of each head that takes its share of the softmax and has no value.
        return_lse: return the logsumexp of the logits too (with ``sinks`` among them), for `merge_attention`.

    Returns:
        ``[B, H, Tq, Dv]`` in the dtype of ``query``, 0 where a query sees no key; with ``return_lse`` also
        ``[B, H, Tq]`` float32 (float64 for float64), -inf where a query sees no key and there is no sink.

    Raises:
        InputError: if shapes or dtypes do not fit each other or the pattern, or an index of the pattern is out of
            range.
    """
    name = "sparse_attention"
    scale = default_scale(name, query) if scale is None else scale
    problem = Problem(pattern, scale, softcap, padding, window, causal, bias)
    check_problem(name, query, key, value, problem)
    if window is not None:  # a longer one is the same, and could leave the range of the positions
        problem = replace(problem, window=min(window, max(1, key.shape[2])))
    if sinks is not None:
        check_floating(name, "sinks", sinks)
        check_shape(name, "sinks", sinks, query.shape[1])
        check_devices(name, query.device, sinks=sinks)
    learned = (x for x in (query, key, value, bias) if x is not None)
    need_lse = return_lse or sinks is not None or (torch.is_grad_enabled() and any(x.requires_grad for x in learned))
    out, lse = sparse_attention_op(query, key, value, *flat(problem), need_lse)
    if sinks is not None:
        sink = sinks.to(lse.dtype).unsqueeze(-1)
        out = (out * torch.sigmoid(lse - sink).unsqueeze(-1)).to(out.dtype)
        lse = torch.logaddexp(lse, sink)
    return (out, lse) if return_lse else out
