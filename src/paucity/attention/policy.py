"""What a prefill policy is: from the queries and keys of a layer to the pattern that this layer computes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..kernels.attention import Pattern


@dataclass(frozen=True)
class Prompt:
    """What a policy may know of the place that it chooses a pattern for.

    Attributes:
        layer: index of the layer in the model.
        scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None where the model has none.
        padding: ``[B, Tk]`` bool, False where a key is padding; None where none is.
        dropped: ``[B]`` int64, keys at the start of the text that a cropped cache no longer holds; None where it holds
            all.
        window: sliding window of this layer, in keys, self included; None where it sees everything.
    """

    layer: int
    scale: float
    softcap: float | None = None
    padding: Tensor | None = None
    dropped: Tensor | None = None
    window: int | None = None


class PrefillPolicy(BaseModel, ABC):
    """Options of a method, and its choice. One level of classes lies below, one per method; each is portable as JSON.

    Attributes:
        min_length: prompts with fewer tokens, those in the cache included, are computed densely.
        layers: which layers the policy rules; None is all, the others stay dense.
        q_block: queries that share one choice and are computed together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    min_length: int = Field(1024, ge=0)
    layers: list[int] | None = None
    q_block: int = Field(128, ge=1)

    @abstractmethod
    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> Pattern:
        """The keys that each block of queries computes.

        Args:
            query: ``[B, H, Tq, D]`` after the position embedding, the last ``Tq`` of the ``Tk`` tokens.
            key: ``[B, H_kv, Tk, D]``, those of the cache included.
            prompt: the rest.
        """
