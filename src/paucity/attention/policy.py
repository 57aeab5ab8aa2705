"""What a prefill policy is: from the queries and keys of a layer to the keys that this layer computes.

A policy sees texts without padding: rows of a batch whose texts differ in length are given to it apart. So a
batch gives what its rows give alone, whatever the method.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..checks import fail
from ..kernels.attention import Pattern, check_tensors
from .compute import Attended, attend_exactly, attend_pattern
from .prompt import Prompt

if TYPE_CHECKING:
    from .portable import Policy


class PrefillPolicy(BaseModel, ABC):
    """Options of a method, and its choice. One level of classes lies below, one per method; each is portable as JSON.

    A method implements `select`. One that computes something else than attention over a pattern (several passes, other
    positions) overrides `compute` instead, and says in its docstring what.

    Attributes:
        min_length: texts with fewer tokens, those in the cache included, are computed densely.
        layers: which layers the policy rules; None is all, the others stay dense.
        q_block: queries that share one choice and are computed together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    min_length: int = Field(1024, ge=0)
    layers: list[int] | None = None
    q_block: int = Field(128, ge=1)

    @property
    def decodes(self) -> bool:
        """Whether steps with a single query are its own too, instead of dense."""
        return False

    @abstractmethod
    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> Pattern:
        """The keys that each block of queries computes.

        Blocks of queries lie at multiples of ``q_block`` of the text, however much of it came before: query ``i``
        stands at position ``i + Tk - Tq``, in block ``(i + Tk - Tq) // q_block``. The pattern has a row for each block
        from that of the first query to that of the last; of the first one the front may be missing among the queries.
        A `Window` is exact for every query and needs no blocks.

        Args:
            query: ``[B, H, Tq, D]`` after the position embedding, the last ``Tq`` of the ``Tk`` tokens.
            key: ``[B, H_kv, Tk, D]``, those of the cache included.
            prompt: the rest.
        """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, prompt: Prompt) -> Attended:
        """What the method makes of a prompt, whatever its length.

        Args:
            query: ``[B, H, Tq, D]`` after the position embedding, the last ``Tq`` of the ``Tk`` tokens, no padding.
            key: ``[B, H_kv, Tk, D]``.
            value: ``[B, H_kv, Tk, Dv]``.
            prompt: the rest.

        Raises:
            InputError: if shapes do not fit each other, or a value is not finite.
        """
        check_tensors("attend", query, key, value)
        if not query.numel() or not finite(query, key, value):
            if query.numel():
                raise fail("attend", "query, key and value", "be finite", "NaN or infinity")
            return attend_exactly(query, key, value, prompt)
        return self.compute(query, key, value, prompt)

    def compute(self, query: Tensor, key: Tensor, value: Tensor, prompt: Prompt) -> Attended:
        """Attention over what `select` chooses, of inputs that have been checked and are not empty."""
        started = time.perf_counter()
        pattern = self.select(query, key, prompt)
        seconds = time.perf_counter() - started
        return attend_pattern(query, key, value, pattern, prompt, select_seconds=seconds)

    def lookahead(self, length: int) -> int:
        """How many queries of a text of ``length`` tokens share a choice that any of them may sway.

        Output before a multiple of it does not depend on tokens from there on. 1 for patterns fixed in advance; the
        block of queries where the choice is made block by block; ``length`` where the last queries choose for all.
        """
        return length

    def check_model(self, layers: Sequence[int], num_heads: int, num_kv_heads: int) -> None:
        """Raise InputError if the policy is for another model than one with these layers and heads."""


def finite(*tensors: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    wide = (tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)
    return all(bool(total.isfinite()) for total in wide)


class PolicySearch(BaseModel, ABC):
    """Options of a method that looks at a model and at calibration text, and gives the policy for that model."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @abstractmethod
    def fit(self, model: nn.Module, calibration: Sequence[Tensor]) -> "Policy":
        """The policy for ``model``, which is left as it was.

        Args:
            model: a Hugging Face causal language model without a policy.
            calibration: token ids ``[B, T]``, one batch after another.
        """
