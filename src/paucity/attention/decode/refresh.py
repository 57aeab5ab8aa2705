"""A choice that holds for several steps."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache.cached import Cached
from .policy import DecodePolicy


class Choice(NamedTuple):
    """What was chosen for each list.

    Attributes:
        numbers: ``[B, H_kv, n]`` integers, -1 is none.
        lengths: ``[B, H_kv]`` int64, entries of the list at the time.
    """

    numbers: Tensor
    lengths: Tensor


def refreshed(policy: DecodePolicy, cached: Cached, every: int, choose: Callable[[], Tensor]) -> Choice:
    """The last choice of each list, or a new one where that is ``every`` tokens old or was not needed.

    Each list keeps its own time, from the first step at which it is ``policy.min_length`` long, so that a row of a
    batch chooses when it would alone.

    Args:
        policy: what chooses; what another one chose is not looked at.
        cached: the lists, and the memory of the choice.
        every: tokens that a choice holds for.
        choose: gives ``[B, H_kv, n]``; asked at most once.
    """
    now = cached.num_text.unsqueeze(-1).expand_as(cached.lengths)
    owner, old, chosen_at = cached.memory.get("choice", (None, None, None))
    if owner != policy:
        due, chosen_at = torch.ones_like(now, dtype=torch.bool), now
    else:
        due = (chosen_at < 0) | (now - chosen_at >= every)
    if owner != policy or bool(due.any()):
        numbers, lengths = choose(), cached.lengths
        if owner == policy:
            numbers, before = same_width(numbers, old.numbers)
            numbers = torch.where(due.unsqueeze(-1), numbers, before)
            lengths = torch.where(due, lengths, old.lengths)
        chosen_at = torch.where(due, now, chosen_at).masked_fill(cached.lengths < policy.min_length, -1)
        old = Choice(numbers, lengths)
        cached.memory["choice"] = policy, old, chosen_at
    found: Choice = old
    return found


def same_width(*numbers: Tensor) -> list[Tensor]:
    """Lists ``[..., n]`` brought to one ``n`` with -1."""
    width = max(one.shape[-1] for one in numbers)
    return [torch.nn.functional.pad(one, (0, width - one.shape[-1]), value=-1) for one in numbers]
