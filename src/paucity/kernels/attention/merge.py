"""Partial results of attention over disjoint sets of keys, made one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import check_floating, check_shape, fail


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from attention over disjoint parts of them, for the same queries; differentiable.

    Args:
        outs: of each part ``[..., Dv]``.
        lses: of each part the logsumexp of its logits ``[...]``, -inf where a query saw nothing of it.

    Returns:
        Out ``[..., Dv]`` in the dtype of the first part and logsumexp ``[...]``; 0 and -inf where no part saw a key.

    Raises:
        InputError: if there is no part, or shapes do not fit each other.
    """
    name = "merge_attention"
    if not outs or len(outs) != len(lses):
        raise fail(name, "outs", "have one entry for each of lses, at least one", f"{len(outs)} for {len(lses)}")
    for number, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_floating(name, f"outs[{number}]", out)
        check_floating(name, f"lses[{number}]", lse)
        check_shape(name, f"outs[{number}]", out, *outs[0].shape)
        check_shape(name, f"lses[{number}]", lse, *outs[0].shape[:-1])
    stacked = torch.stack([lse.to(torch.promote_types(lse.dtype, torch.float32)) for lse in lses])
    peak = stacked.detach().amax(0)
    empty = peak == -torch.inf
    peak = peak.masked_fill(empty, 0.0)
    share = (stacked - peak).exp()
    total = share.sum(0).masked_fill(empty, 1.0)
    parts = torch.stack([out.to(share.dtype) for out in outs])
    merged = (parts * (share / total).unsqueeze(-1)).sum(0)
    return merged.to(outs[0].dtype), (total.log() + peak).masked_fill(empty, -torch.inf)
