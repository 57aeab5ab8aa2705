"""A linear layer that does not read the weights of the inputs that a mask drops."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from ..kernels.linear import input_major, masked_input_linear, pays


class SparseInputLinear(nn.Linear):
    """A linear layer in place of another, over the inputs that a mask keeps.

    It is the other layer but for its forward: the parameters and hooks are the same objects. The weight is stored
    input-major while it is in place, with the same values and shape.
    """

    keep: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, linear: nn.Linear, keep: Callable[[Tensor], Tensor]) -> Self:
        """The layer that takes the place of ``linear``; ``keep`` gives the mask of an input, True is kept."""
        layer = cls.__new__(cls)
        layer.__dict__.update(linear.__dict__)
        layer.keep = keep
        linear.weight.data = input_major(linear.weight.data)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """``[..., out]`` from ``[..., in]``; read sparsely for few tokens, as a dense product for many."""
        mask = self.keep(input)
        if input.dtype != self.weight.dtype:  # autocast is to choose the dtype
            return super().forward(input.masked_fill(~mask, 0))
        return masked_input_linear(input, self.weight, mask, self.bias)


def install(model: nn.Module, path: str, keep: Callable[[Tensor], Tensor]) -> Callable[[], None] | None:
    """Put a `SparseInputLinear` in the place of the linear layer at ``path``.

    Returns:
        A function that puts the layer back as it was; None, and nothing is changed, where the layer is of another kind
        or reading less would gain nothing: a small weight, or no kernel for it on this machine.
    """
    linear = model.get_submodule(path)
    if type(linear) is not nn.Linear or not path or not pays(linear.weight):
        return None
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, name, SparseInputLinear.of(linear, keep))

    def restore() -> None:
        linear.weight.data = linear.weight.data.contiguous(memory_format=torch.contiguous_format)
        setattr(owner, name, linear)

    return restore
