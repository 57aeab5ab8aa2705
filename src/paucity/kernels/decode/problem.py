"""What every twin of decode attention computes."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """``softmax(softcap(scale * q k^T)) v`` over the listed keys that a query sees; checked by who makes it.

    Query ``i`` of ``Tq`` stands at position ``length - Tq + i`` of its row. It sees the listed keys that are no
    padding, not later than itself and, with ``window``, among the last ``window`` keys, itself included.

    Attributes:
        scale: factor on the products.
        pages: ``[B or 1, Hkv or 1, n]`` int32 or int64, page numbers; -1 is none. None lists every key.
        page_size: keys of a page.
        lengths: ``[B, Hkv]`` int64, keys that count in each list; None is all.
        starts: ``[B, Hkv]`` int64, where the list of a KV head begins in the cache; positions, pages and lengths count
            from there. None is the first key.
        padding: ``[B, Tk]`` bool, False where a key is padding; None where none is.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None is no cap.
        window: sliding window of the model.
    """

    scale: float
    pages: Tensor | None = None
    page_size: int = 1
    lengths: Tensor | None = None
    starts: Tensor | None = None
    padding: Tensor | None = None
    softcap: float | None = None
    window: int | None = None
