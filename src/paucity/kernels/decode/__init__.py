"""Decode attention: one or a few queries against a long cache, of which only the listed pages are read."""

import math

import torch
from torch import Tensor

from ...checks import InputTypeError, check_bool, check_floating, check_int, check_ndim, check_range, check_shape, fail
from ..dispatch import check_computable, check_devices
from .op import attend

__all__ = ["decode_attention"]

_NAME = "decode_attention"
_MOST = 2**63 - 1  # the largest integer that an operator takes


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor | None = None,
    *,
    page_size: int = 1,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    padding: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T) v`` over the listed keys; nothing else of the cache is read.

    Query ``i`` of ``Tq`` stands at position ``length - Tq + i`` and sees no later key. The cache may be a slice of a
    larger buffer; it is not copied while its last dimension is contiguous. Where two sets of keys are disjoint, the
    results of two calls merge by their lse: ``out = (out_1 e^lse_1 + out_2 e^lse_2) / (e^lse_1 + e^lse_2)``.

    Made for inference: there are gradients for ``query``, ``key``, ``value`` and ``sinks``, but on every device they
    are those of the readable reference, which gathers the listed keys and computes densely.

    Args:
        query: ``[B, H, Tq, D]`` float; a few queries, the newest of their row.
        key: ``[B, Hkv, Tk, D]``, ``H`` a multiple of ``Hkv``, of the same dtype.
        value: ``[B, Hkv, Tk, Dv]``, of the same dtype.
        pages: ``[B or 1, Hkv or 1, n]`` int32 or int64: the pages that the queries of a KV head read, in any order and
            without repeats (a page listed twice counts twice); -1 is none. None is every page.
        page_size: page ``p`` is the keys ``p * page_size`` to ``(p + 1) * page_size - 1``; 1 lists single keys.
        lengths: ``[B]`` or ``[B, Hkv]`` int32 or int64, keys that count in a row or for a KV head, all by default.
        starts: ``[B]`` or ``[B, Hkv]`` int32 or int64, the place of the first key that counts, 0 by default;
            positions, pages and lengths count from there. So lists of any length can share one buffer ``[N, D]``,
            expanded to ``[B, Hkv, N, D]``, and rows with padding before their text have pages of their own.
        padding: ``[B, Tk]`` bool, False where a key is padding.
        scale: factor on the products, ``1 / sqrt(D)`` by default.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        window: keys visible, self included, on top of the pages.
        sinks: ``[H]`` float, a learned logit of each head that takes part in the softmax and has no value.
        return_lse: also return the logarithm of the softmax's denominator.

    Returns:
        ``[B, H, Tq, Dv]`` in the dtype of ``query``, 0 where a query sees no key; with ``return_lse`` also
        ``[B, H, Tq]`` float32 (float64 for float64), -inf where a query sees neither key nor sink.

    Raises:
        InputError: if shapes or dtypes do not fit, or a page or a length is out of range.
    """
    _check(query, key, value, pages, page_size, lengths, starts, padding, softcap, window, sinks)
    if scale is not None:
        check_range(_NAME, "scale", scale, open_low=True, open_high=True)
    lengths, starts = (_by_head(x, key.shape[:2]) for x in (lengths, starts))
    scale = 1 / math.sqrt(query.shape[-1] or 1) if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    page_size, window = min(page_size, _MOST), None if window is None else min(window, _MOST)
    out, lse = attend(query, key, value, pages, lengths, starts, padding, page_size, scale, softcap, window)
    if sinks is not None:
        sink = sinks.to(lse.dtype).view(-1, 1)
        share = torch.sigmoid(lse - sink.clamp(min=torch.finfo(lse.dtype).min))  # -inf - -inf is no number
        out = (out * share.unsqueeze(-1)).to(out.dtype)
        lse = torch.logaddexp(lse, sink)
    return (out, lse) if return_lse else out


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor | None,
    page_size: int,
    lengths: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> None:
    check_ndim(_NAME, "query", query, 4)
    check_computable(_NAME, "query", query)
    batch, heads, _, dim = query.shape
    check_shape(_NAME, "key", key, batch, None, None, dim)
    _, kv_heads, keys, _ = key.shape
    check_shape(_NAME, "value", value, batch, kv_heads, keys, None)
    for argument, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise InputTypeError(f"{_NAME}: {argument} must be {query.dtype} like query, got {tensor.dtype}.")
    if kv_heads == 0 or heads % kv_heads:
        raise fail(_NAME, "query", f"have a multiple of {kv_heads} heads", heads)
    check_int(_NAME, "page_size", page_size)
    if pages is not None:
        check_ndim(_NAME, "pages", pages, 3)
        _check_integers("pages", pages)
        if pages.shape[0] not in (1, batch) or pages.shape[1] not in (1, kv_heads):
            raise fail(_NAME, "pages", f"fit {batch} rows and {kv_heads} heads of keys", list(pages.shape))
    for argument, numbers in (("lengths", lengths), ("starts", starts)):
        if numbers is not None:
            check_shape(_NAME, argument, numbers, *(batch, kv_heads)[: max(1, numbers.ndim)])
            _check_integers(argument, numbers)
    if padding is not None:
        check_bool(_NAME, "padding", padding)
        check_shape(_NAME, "padding", padding, batch, keys)
    if softcap is not None:
        check_range(_NAME, "softcap", softcap, 0, open_low=True, open_high=True)
    if window is not None:
        check_int(_NAME, "window", window)
    if sinks is not None:
        check_floating(_NAME, "sinks", sinks)
        check_shape(_NAME, "sinks", sinks, heads)
    others = {"key": key, "value": value, "pages": pages, "lengths": lengths, "starts": starts}
    check_devices(_NAME, query.device, **others, padding=padding, sinks=sinks)


def _by_head(numbers: Tensor | None, shape: torch.Size) -> Tensor | None:
    """``[B, Hkv]`` int64."""
    if numbers is None:
        return None
    return (numbers.long() if numbers.ndim == 2 else numbers.long().unsqueeze(1)).expand(shape)


def _check_integers(argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise InputTypeError(f"{_NAME}: {argument} must be int32 or int64, got {tensor.dtype}.")
