"""What decode policies share: exact weights, and the best keys or pages of lists of different lengths."""

import torch
from torch import Tensor

from ...ops.blocks import soft_capped
from ..cache.cached import Cached
from ..prompt import Prompt


def exact_weights(query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
    """Softmax over all keys that a new token sees, ``[B, H_kv, G, longest]`` float32; 0 beyond a list.

    Args:
        query: ``[B, H, 1, D]``.
        cached: the lists.
        prompt: scale, softcap and window.
    """
    keys = cached.keys()
    rows = grouped(query, keys.shape[1])
    if keys.dtype == torch.float16:  # products overflow before they are scaled
        rows, keys = rows.float(), keys.float()
    lists = zip(rows.flatten(0, 1), keys.flatten(0, 1), strict=True)
    # One by one: a product of batches copies lists that do not lie end to end, which takes seven times as long.
    products = torch.stack([some @ own.mT for some, own in lists]).view(*keys.shape[:2], -1, keys.shape[2])
    logits = soft_capped(products.float() * prompt.scale, prompt.softcap)
    return logits.masked_fill(~seen(cached, prompt).unsqueeze(2), -torch.inf).softmax(-1).nan_to_num(0.0)


def grouped(query: Tensor, kv_heads: int) -> Tensor:
    """The queries ``[B, H, 1, D]`` of a step by the KV head that they share, ``[B, H_kv, G, D]``."""
    return query.reshape(len(query), kv_heads, query.shape[1] // kv_heads, query.shape[-1])


def seen(cached: Cached, prompt: Prompt) -> Tensor:
    """``[B, H_kv, longest]`` bool: entries of each list that the newest token sees."""
    place, ends = torch.arange(cached.longest, device=cached.lengths.device), cached.lengths.unsqueeze(-1)
    inside = place < ends
    return inside if prompt.window is None else inside & (place >= ends - prompt.window)


def top_pages(
    score: Tensor,
    cached: Cached,
    num_pages: int,
    *,
    page_size: int = 1,
    first: int = 0,
    last: int = 0,
    window: int | None = None,
) -> Tensor:
    """The pages of each list with the highest scores, ``[B, H_kv, n]`` int32, -1 where a list has fewer.

    Args:
        score: ``[B, H_kv, P]`` of pages of ``page_size`` keys; those beyond a list are not looked at, and where pages
            at the end have no score yet they must be among the ``last``.
        cached: the lists.
        num_pages: pages to take.
        page_size: keys of a page.
        first: pages at the start of each list that are among them whatever their score, as far as there is room.
        last: pages at the end of each list that are, too, before those.
        window: keys that the newest token sees, itself included; pages before them are not taken.
    """
    longest, last = -(-cached.longest // page_size), min(last, num_pages)
    first = min(first, num_pages - last)
    score = score[..., :longest].float().clone()
    if score.shape[-1] < longest:
        score = torch.nn.functional.pad(score, (0, longest - score.shape[-1]))
    score[..., :first] = torch.inf
    if window is None and cached.even:
        score[..., longest - min(last, longest) :] = torch.inf
        return score.topk(min(num_pages, longest), dim=-1).indices.int()
    place, pages = torch.arange(longest, device=score.device), -(-cached.lengths.unsqueeze(-1) // page_size)
    outside = place >= pages
    if window is not None:
        outside = outside | ((place + 1) * page_size <= cached.lengths.unsqueeze(-1) - window)
    score = score.masked_fill(place >= pages - last, torch.inf).masked_fill(outside, -torch.inf)
    best = score.topk(min(num_pages, longest), dim=-1)
    return best.indices.masked_fill(best.values == -torch.inf, -1).int()
