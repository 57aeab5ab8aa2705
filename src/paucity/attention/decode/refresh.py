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


class _Held(NamedTuple):
    """A choice as it is remembered.

    Attributes:
        policy: what chose.
        choice: what it chose.
        chosen_at: ``[B, H_kv]`` int64, tokens of the text at the time; -1 where a choice was not needed.
        due: tokens seen when the first list must choose again.
    """

    policy: DecodePolicy
    choice: Choice
    chosen_at: Tensor
    due: int


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
    held: _Held | None = cached.memory.get("choice")
    held = held if held is not None and held.policy == policy else None
    if held is not None and cached.num_seen < held.due:
        return held.choice
    now = cached.num_text.unsqueeze(-1).expand_as(cached.lengths)
    numbers, lengths, chosen_at = choose(), cached.lengths, now
    if held is not None:
        due = (held.chosen_at < 0) | (now - held.chosen_at >= every)
        numbers, before = same_width(numbers, held.choice.numbers)
        numbers = torch.where(due.unsqueeze(-1), numbers, before)
        lengths, chosen_at = (
            torch.where(due, new, old) for new, old in ((lengths, held.choice.lengths), (chosen_at, held.chosen_at))
        )
    chosen_at = chosen_at.masked_fill(cached.lengths < policy.min_length, -1)
    left = (every - (now - chosen_at)).where(chosen_at >= 0, 1)
    choice, due_at = Choice(numbers, lengths), cached.num_seen + (int(left.min()) if left.numel() else 1)
    cached.memory["choice"] = _Held(policy, choice, chosen_at, due_at)
    return choice


def same_width(*numbers: Tensor) -> list[Tensor]:
    """Lists ``[..., n]`` brought to one ``n`` with -1."""
    width = max(one.shape[-1] for one in numbers)
    return [torch.nn.functional.pad(one, (0, width - one.shape[-1]), value=-1) for one in numbers]
