"""What speculative decoding returns."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Speculation:
    """Tokens, and what the steps of speculation did; a step is one pass of the model that verifies.

    Attributes:
        tokens: int64 ``[B, prompt + new]``, prompts as they were given; rows that ended are filled up.
        drafted: int64 ``[steps]``, tokens that were proposed to each row.
        accepted: int64 ``[steps, B]``, how many of them the model took; 0 in rows that had ended.
        advanced: int64 ``[steps]``, tokens that each row gained: one more than all rows accepted, if so many fit and
            not all rows end before.
        prefill_seconds: of the prompt.
        draft_seconds: of drafting, 0 where drafts come with the pass that verifies.
        verify_seconds: of the rest.
        draft_density: share of the pairs of query and key that drafting computed, where the draft tells.
        ended: bool ``[steps, B]``, rows that had ended before the step; None where none had.
    """

    tokens: Tensor
    drafted: Tensor
    accepted: Tensor
    advanced: Tensor
    prefill_seconds: float
    draft_seconds: float
    verify_seconds: float
    draft_density: float | None = None
    ended: Tensor | None = None

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a row gains in a pass that verifies; plain decoding has 1."""
        return float(self.advanced.double().mean()) if len(self.advanced) else 1.0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted, in rows that had not ended."""
        rows = self.drafted.unsqueeze(1).expand_as(self.accepted)
        total = int((rows if self.ended is None else rows.masked_fill(self.ended, 0)).sum())
        return float(self.accepted.sum()) / total if total else 0.0

    @property
    def decode_seconds(self) -> float:
        """Seconds after the prompt."""
        return self.draft_seconds + self.verify_seconds


def end_tokens(model: nn.Module, given: int | Sequence[int] | None) -> set[int]:
    """The tokens that end a text: those given, or those of the model's generation configuration."""
    return set(_ends(model, given))


def pad_token(model: nn.Module, given: int | Sequence[int] | None) -> int:
    """What follows the end of a row: the pad token of the model's generation configuration, or the first end."""
    pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return int(pad) if pad is not None else next(iter(_ends(model, given)), 0)


def _ends(model: nn.Module, given: int | Sequence[int] | None) -> list[int]:
    if given is None:
        config = getattr(model, "generation_config", None) or model.config
        given = getattr(config, "eos_token_id", None)
    if given is None:
        return []
    return [given] if isinstance(given, int) else list(given)
