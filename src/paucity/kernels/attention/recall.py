"""How much of dense attention a pattern keeps."""

import torch
from torch import Tensor

from ...ops.blocks import grouped_products, soft_capped
from ...ops.formats.stripes import causal_mask
from .check import check_problem, default_scale
from .pairs import visible
from .problem import Pattern, Problem


def attention_recall(
    query: Tensor,
    key: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    padding: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Share of the dense attention mass that the pattern keeps, mean over queries; costs as much as dense attention.

    Args:
        query: ``[B, H, Tq, D]``.
        key: ``[B, H_kv, Tk, D]``.
        pattern: which keys a block of queries sees.
        scale: factor on the logits, ``1 / sqrt(D)`` by default.
        softcap: as in `sparse_attention`.
        padding: ``[B, Tk]`` bool, False where a key is padding.
        window: sliding window of the model.

    Returns:
        ``[B, H]`` float32 in [0, 1]; padded queries are not counted.

    Raises:
        InputError: if shapes do not fit each other or the pattern.
    """
    scale = default_scale("attention_recall", query) if scale is None else scale
    problem = Problem(pattern, scale, softcap, padding, window)
    check_problem("attention_recall", query, key, key, problem)
    batch, heads, queries = query.shape[:3]
    keys, offset = key.shape[2], key.shape[2] - queries
    block = max(1, 128 // pattern.q_block) * pattern.q_block
    total = torch.zeros(batch, heads, device=query.device)
    for first in range(0, queries, block):
        rows = query[:, :, first : first + block].float() * scale
        last = first + rows.shape[2]
        stop = offset + last
        logits = soft_capped(grouped_products(rows, key[:, :, :stop].float()), softcap)
        seen = causal_mask(rows.shape[2], stop, padding=None if padding is None else padding[:, :stop], window=window)
        prob = logits.masked_fill(~seen.to(logits.device), -torch.inf).softmax(-1).nan_to_num(0.0)
        mask = visible(problem, queries, keys, first, last)[..., :stop]
        if mask.shape[1] not in (1, heads):
            mask = mask.repeat_interleave(heads // mask.shape[1], dim=1)
        kept = (prob * mask).sum(-1)
        total += (kept if padding is None else kept * padding[:, None, offset + first : stop]).sum(-1)
    counted = torch.tensor(queries) if padding is None else padding[:, offset:].sum(-1, keepdim=True)
    return total / counted.clamp(min=1).to(total.device)
