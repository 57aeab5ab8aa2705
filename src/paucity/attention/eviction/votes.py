"""Votes of the last queries of a prompt for the entries before them, as SnapKV and PyramidKV have them."""

from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional as F

from ...checks import fail
from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import by_group, probabilities


def _odd(kernel_size: int) -> int:
    if kernel_size % 2 == 0:
        raise fail("window_votes", "kernel_size", "be odd", kernel_size)
    return kernel_size


Kernel = Annotated[int, Field(ge=1), AfterValidator(_odd)]
"""Keys over which votes are pooled."""

Pooling = Literal["avg", "max"]
"""Their mean or their greatest."""


def window_votes(
    query: Tensor, cached: Cached, prompt: Prompt, *, window_size: int, kernel_size: int, pooling: Pooling
) -> Tensor:
    """Attention that the last ``window_size`` tokens of a row pay to each entry, pooled over neighbours.

    It is summed over the queries and, with grouped queries, averaged over the heads that share an entry. The tokens of
    the window themselves have inf.

    Args:
        query: ``[B, H, Tq, D]``, the newest; of fewer than ``window_size`` all vote.
        cached: the lists.
        prompt: of the layer.
        window_size: tokens that vote.
        kernel_size: neighbours that are pooled, an odd number; by place in the list, so that a cluster stays together.
        pooling: their mean or their greatest.

    Returns:
        ``[B, H_kv, longest]`` float32.
    """
    window = cached.positions() >= cached.num_seen - window_size
    votes = by_group(probabilities(query[:, :, -window_size:], cached, prompt).sum(2), cached.lengths.shape[1])
    votes = votes.masked_fill(window | ~cached.inside(), 0.0)  # what is not there counts as nothing, whatever the batch
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    pooled: Tensor = pool(votes, kernel_size, stride=1, padding=kernel_size // 2)
    return pooled.masked_fill(window, torch.inf)
