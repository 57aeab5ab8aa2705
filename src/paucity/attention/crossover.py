"""From which length on a policy is faster than dense attention, on this machine and this model."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..checks import check_int, check_ndim, fail
from .policy import PrefillPolicy
from .watch import Seconds, attention_seconds, record


@dataclass(frozen=True)
class Crossover:
    """Times of the attention part, selection included, of all ruled layers together.

    Attributes:
        lengths: tokens, ascending.
        seconds: at each length.
    """

    lengths: tuple[int, ...]
    seconds: tuple[Seconds, ...]

    @property
    def tokens(self) -> int | None:
        """The shortest measured length from which on the policy is faster at every one; None where there is none."""
        found = None
        for length, times in zip(reversed(self.lengths), reversed(self.seconds), strict=True):
            if times.sparse >= times.dense:
                break
            found = length
        return found


def crossover(
    model: nn.Module,
    policy: PrefillPolicy,
    input_ids: Tensor,
    *,
    lengths: Sequence[int] = (256, 512, 1024, 2048, 4096),
    repeats: int = 5,
) -> Crossover:
    """Time the attention part of prompts of growing lengths, with the policy and dense, in turns.

    Args:
        model: a Hugging Face causal language model without a policy; it is left as it was.
        policy: its ``min_length`` is not looked at.
        input_ids: ``[B, T]`` int64; the first tokens of it are the prompts.
        lengths: tokens of the prompts.
        repeats: rounds.

    Returns:
        The times; ``policy.model_copy(update={"min_length": found.tokens})`` is then dense where dense is faster.

    Raises:
        InputError: if a length is less than 1 or more than ``input_ids`` has.
    """
    check_ndim("crossover", "input_ids", input_ids, 2)
    check_int("crossover", "repeats", repeats)
    if not lengths:
        raise fail("crossover", "lengths", "hold at least one length", "none")
    for length in lengths:
        check_int("crossover", "lengths", length, 1, input_ids.shape[1])
    found = []
    for length in sorted(set(lengths)):
        seen = record(model, input_ids[:, :length], layers=policy.layers)
        layers = [attention_seconds(policy, one, repeats=repeats) for one in seen]
        found.append(Seconds(*(sum(column) for column in zip(*layers, strict=True))))
    return Crossover(tuple(sorted(set(lengths))), tuple(found))
