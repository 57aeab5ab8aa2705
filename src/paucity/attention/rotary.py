"""Rotary position embedding, as far as policies need it: to give queries and keys other positions afterwards.

Paper: Su et al. 2021 (RoFormer), https://arxiv.org/abs/2104.09864, Sec. 3.2.
"""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Rotary:
    """How a layer turned its queries and keys.

    Attributes:
        inv_freq: ``[R / 2]`` float32, radians per position; the first ``R`` dimensions of a head are turned, dimension
            ``i`` together with ``i + R / 2``.
    """

    inv_freq: Tensor


def find_rotary(model: nn.Module, layer: int) -> Rotary | None:
    """How ``layer`` of a Hugging Face model turns positions; None where it has no rotary embedding of a kind known."""
    for module in model.modules():
        inv_freq = getattr(module, "inv_freq", None)
        if isinstance(inv_freq, Tensor):
            return Rotary(inv_freq.float())
    return None
