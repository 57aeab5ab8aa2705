"""What a policy may know of the place that it chooses keys for."""

from dataclasses import dataclass

from torch import Tensor

from .rotary import Rotary


@dataclass(frozen=True)
class Prompt:
    """A layer, and what is computed of it.

    Attributes:
        layer: index of the layer in the model.
        scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None where the model has none.
        window: sliding window of this layer, in keys, self included; None where it sees everything.
        dropped: keys at the start of the text that a cropped cache no longer holds.
        heads: which query heads of the layer are given, by index; None is all of them, in order.
        num_heads: query heads of the layer; None is as many as are given.
        num_layers: layers with attention in the model; None where that is not known.
        rotary: how the layer turned its queries and keys by position; None where that is not known.
    """

    layer: int = 0
    scale: float = 1.0
    softcap: float | None = None
    window: int | None = None
    dropped: int = 0
    heads: tuple[int, ...] | None = None
    num_heads: int | None = None
    num_layers: int | None = None
    rotary: Rotary | None = None

    def head_indices(self, query: Tensor) -> tuple[int, ...]:
        """The index in the layer of each head of ``query`` ``[B, H, Tq, D]``."""
        return tuple(range(query.shape[1])) if self.heads is None else self.heads
