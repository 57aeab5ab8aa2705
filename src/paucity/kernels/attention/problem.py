"""What every twin of sparse attention computes."""

from dataclasses import dataclass

from torch import Tensor

from ...ops.formats.block import BlockMask
from ...ops.formats.stripes import KeyLists, Window

Pattern = BlockMask | KeyLists | Window


@dataclass(frozen=True)
class Problem:
    """``softmax(softcap(scale * q k^T) + bias) v`` over the keys that a query sees; checked by who makes it.

    Query ``i`` of ``Tq`` stands at key position ``i + Tk - Tq``. It sees a key that the pattern keeps, that is no
    padding, with ``causal`` not later than itself, and with ``window`` one of its last ``window`` keys, self included.

    Attributes:
        pattern: which keys a block of queries sees; a `Window` is causal and exact for every query.
        scale: factor on the products.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None is no cap.
        padding: ``[B, Tk]`` bool, False where a key is padding; None where none is.
        window: sliding window of the model.
        causal: whether later keys are hidden.
        bias: ``[B or 1, H or 1, Tq or 1, Tk]`` float, added to the logits; -inf hides a key.
    """

    pattern: Pattern
    scale: float
    softcap: float | None = None
    padding: Tensor | None = None
    window: int | None = None
    causal: bool = True
    bias: Tensor | None = None
