"""The attention and mask functions that transformers calls, by name, through its two registries.

Nothing is patched: a model whose configuration names `NAME` as its attention calls these two. An attention module
carries its policies in an attribute of its own, so that a deep copy of a model is as sparse as the model was.
`torch.compile` leaves both alone: what is chosen depends on the data.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..checks import InputError
from ..ops.blocks import soft_capped
from ..ops.formats.stripes import Window, causal_mask
from .cached_attention import attend_cached, count_dense, evict
from .prompt import Prompt
from .site import ATTRIBUTE, Site

_FOREVER = torch.iinfo(torch.int32).max


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What a layer may see, without ``T * T`` entries where it can be told shorter; arguments as transformers has them.

    Returns:
        None where attention is just causal; for other causal and for sliding-window masks, with padding or without,
        ``[B or 1, kv_offset + kv_length]`` int32: how many queries see each key of the text, from its own on (0 for
        padding); for any other kind the mask itself, ``[B, 1, q_length, kv_length]`` bool.
    """
    length = kv_offset + kv_length
    plain = allow_is_causal_skip and isinstance(q_offset, int) and q_offset + q_length == length
    # Two rows in succession tell a sliding window from chunks: these begin at the same place only if nothing is cut.
    query = torch.arange(max(q_offset, length - 2), length, device=device)[:, None] if plain else None
    if query is not None:
        key = torch.arange(kv_offset, length, device=device)
        wanted = key <= query if local_size is None else (key <= query) & (key > query - local_size)
        zero = torch.zeros((), dtype=torch.long, device=device)
        plain = bool((mask_function(zero, zero, query, key) == wanted).all())
    if not plain:
        return sdpa_mask(  # type: ignore[no-any-return]
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            use_vmap=kwargs.get("use_vmap", False),
            device=device,
        )
    valid = None if attention_mask is None else attention_mask[:, :length].bool()
    if valid is not None and (bool(valid.all()) and valid.shape[1] == length):
        valid = None
    reach = _FOREVER if local_size is None or local_size >= length else local_size
    if valid is None:
        # A cropped cache is told by its length alone, so nothing is None there.
        return (
            None
            if reach == _FOREVER and not kv_offset
            else torch.full((1, length), reach, dtype=torch.int32, device=device)
        )
    return torch.nn.functional.pad(valid.int() * reach, (0, length - valid.shape[1]))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a layer, by its policy where it has one.

    Args:
        module: the attention module.
        query: ``[B, H, Tq, D]``.
        key: ``[B, H_kv, Tk, D]``, those of the cache included.
        value: ``[B, H_kv, Tk, Dv]``.
        attention_mask: what `attention_mask` returned, or the caller's own ``[B, 1 or H, Tq, Tk]``.
        dropout: as in SDPA.
        scaling: factor on the logits.
        softcap: cap of the logits.
        is_causal: whether attention is causal, instead of ``module.is_causal``.
        kwargs: what else models pass; a sliding window is read from the mask, except for whether there is one.

    Returns:
        ``[B, Tq, H, Dv]`` and no weights.

    Raises:
        InputError: if the layer has learned sinks, a position bias or a paged cache, or its cache was evicted from and
            the call is one that needs what is gone.
    """
    for unknown in ("s_aux", "position_bias", "cache"):
        if kwargs.get(unknown) is not None:
            raise InputError(f"attention: {type(module).__name__} must use plain attention, got {unknown}.")
    site = getattr(module, ATTRIBUTE, None)
    site = site if isinstance(site, Site) else None
    layer = None if site is None else site.take_layer(key)
    prompted = site is not None and site.prefill is not None and (query.shape[2] > 1 or site.prefill.policy.decodes)
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or (attention_mask is not None and attention_mask.ndim != 2):
        if site is not None:
            count_dense(site, layer, prompted, "mask of another kind")
        key, value = (key, value) if layer is None else layer.whole(key, value)
        return _dense(module, query, key, value, attention_mask, scale, softcap, dropout, causal), None
    seen = key.shape[2] if layer is None else layer.seen
    padding, window, dropped = _read_mask(attention_mask, len(query), seen)
    out = None
    if site is not None:
        prompt = Prompt(site.layer, scale, softcap, window, num_layers=site.num_layers, rotary=site.rotary)
        if layer is not None and not (prompted and layer.policy is None):
            out = attend_cached(site, layer, query, prompt, padding, dropout)
        if out is None and layer is not None:
            key, value = layer.whole(key, value)
        if out is None and prompted:
            out = _by_policy(site, query, key, value, prompt, padding, dropped, dropout)
    if out is None:
        queries, keys = query.shape[2], key.shape[2]
        mask = None
        if padding is not None or window is not None or 1 < queries < keys:
            mask = causal_mask(queries, keys, padding=padding, window=window, device=key.device)
        out = _dense(module, query, key, value, mask, scale, softcap, dropout, queries > 1)
    else:
        out = out.transpose(1, 2).contiguous()
    if site is not None and layer is not None:
        windowed = window is not None or kwargs.get("sliding_window") is not None
        evict(site, layer, query, prompt, padding, windowed)
    return out, None


def _by_policy(
    site: Site,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt: Prompt,
    padding: Tensor | None,
    dropped: Tensor | None,
    dropout: float,
) -> Tensor | None:
    """Attention of a prompt ``[B, H, Tq, Dv]``, or None where all of it must be dense; counts what is computed."""
    assert site.prefill is not None
    applied, policy = site.prefill, site.prefill.policy
    texts = _texts(padding, dropped, len(query), key.shape[2])
    longest = max((stop - first + gone for first, stop, gone in texts or ()), default=0)
    reason = None
    if dropout:
        reason = "attention dropout"
    elif texts is None:
        reason = "padding inside the text"
    elif longest < policy.min_length:
        reason = "prompt shorter than min_length"
    if reason is not None or texts is None or site.layer not in applied.layers:
        pairs = exact_pairs(query.shape[2], key.shape[2], prompt.window, padding).expand(len(query), 1)
        applied.counts.add(site.layer, query.shape[1], pairs, pairs)
        if site.layer in applied.layers and reason is not None:
            applied.counts.dense[reason] += 1
        return None
    if len(texts) == 1 and (0, key.shape[2]) == next(iter(texts))[:2]:
        return applied.attend(query, key, value, replace(prompt, dropped=next(iter(texts))[2]))
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    before = key.shape[2] - query.shape[2]
    for (first, stop, gone), rows in texts.items():
        begin = max(0, first - before)
        if stop - before <= begin:  # no query of these texts is among the queries
            continue
        mine, theirs = slice(begin, stop - before), slice(first, stop)
        taken = query[rows, :, mine], key[rows, :, theirs], value[rows, :, theirs]
        out[rows, :, mine] = applied.attend(*taken, replace(prompt, dropped=gone))
    return out


def _texts(
    padding: Tensor | None, dropped: Tensor | None, batch: int, num_keys: int
) -> dict[tuple[int, int, int], list[int]] | None:
    """Rows of the batch by (first key, end, keys dropped) of their text; None if padding lies inside of one."""
    gone = [0] * batch if dropped is None else dropped.expand(batch).tolist()
    spans = [(0, num_keys)] * batch
    if padding is not None:
        counts, first = padding.sum(-1).tolist(), padding.int().argmax(-1).tolist()
        spans = [(start, start + count) for start, count in zip(first, counts, strict=True)]
        inside = torch.arange(num_keys, device=padding.device)
        ends = torch.tensor(spans, device=padding.device)
        if (padding != (inside >= ends[:, :1]) & (inside < ends[:, 1:])).any():
            return None
    texts: dict[tuple[int, int, int], list[int]] = {}
    for row, (start, stop) in enumerate(spans):
        if stop > start:
            texts.setdefault((start, stop, gone[row]), []).append(row)
    return texts


def exact_pairs(num_queries: int, num_keys: int, window: int | None, padding: Tensor | None = None) -> Tensor:
    """Pairs of a query and a key that it sees in the dense model, ``[B or 1, 1]`` int64; padding is not counted."""
    return Window(max(1, num_keys)).kept_pairs(num_queries, num_keys, padding=padding, window=window)


def _read_mask(reach: Tensor | None, batch: int, num_keys: int) -> tuple[Tensor | None, int | None, Tensor | None]:
    """Padding ``[B, Tk]``, window, keys dropped by the cache ``[B]``, from what `attention_mask` returned."""
    if reach is None:
        return None, None, None
    valid = (reach > 0).expand(batch, -1)
    gone = reach.shape[1] - num_keys
    widest = int(reach.max())
    padding = None if bool(valid[:, gone:].all()) else valid[:, gone:]
    dropped = valid[:, :gone].sum(-1) if gone else None
    return padding, widest if 0 < widest < num_keys else None, dropped


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    causal: bool,
) -> Tensor:
    """``[B, Tq, H, D]`` by SDPA; with soft-capped logits, which it does not have, in plain PyTorch."""
    if softcap is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scale, is_causal=causal
        )
        return out  # type: ignore[no-any-return]
    batch, heads, queries, dim = query.shape
    score = (query.reshape(batch, key.shape[1], -1, dim) @ key.mT).view(batch, heads, queries, -1) * scale
    score = soft_capped(score, softcap)
    if mask is None and causal:
        mask = causal_mask(queries, key.shape[2], device=key.device)
    if mask is not None:
        lowest = torch.finfo(score.dtype).min
        score = score.masked_fill(~mask, lowest) if mask.dtype == torch.bool else score + mask
    prob = nn.functional.dropout(score.float().softmax(-1).to(query.dtype), dropout)
    out = prob.view(batch, key.shape[1], -1, key.shape[2]) @ value
    return out.view(batch, heads, queries, -1).transpose(1, 2).contiguous()
