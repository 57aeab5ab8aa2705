"""A linear layer that holds its weight packed."""

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import InputTypeError, check_shape, fail
from ...ops.formats.block_rows import PackedBlocks
from ...ops.formats.groups import PackedGroups
from ...ops.formats.packed import PackedBitmask, PackedNM
from . import packed_op
from .packed import Packed, packed_linear

FORMATS: dict[str, type[Packed]] = {
    "bitmask": PackedBitmask,
    "blocks": PackedBlocks,
    "groups": PackedGroups,
    "nm": PackedNM,
}
"""The packed formats by name."""


class PackedLinear(nn.Module):
    """``y = W x + bias`` with ``W`` packed and frozen; see `packed_linear`.

    The parts of the packed weight are buffers, so that devices, dtypes, copies and ``state_dict`` work as for any
    module; gradients flow to the input and to the bias. Under autocast the product is computed in the weight's own
    dtype and the result is given in autocast's.

    Args:
        weight: of dense shape ``[out, in]``.
        bias: ``[out]`` of the weight's dtype; becomes a parameter. None for none.
        dense: the same weight ``[out, in]``, kept beside for more than 16 tokens, where it is faster; it is no part of
            the ``state_dict``. None unpacks chunks of rows there.
        transposed: whether the layer that this one stands for stores ``[in, out]``, as transformers' ``Conv1D`` does.

    Raises:
        InputError: if the parts do not fit together.
    """

    dense: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, weight: Packed, bias: Tensor | None = None, *, dense: Tensor | None = None, transposed: bool = False
    ) -> None:
        super().__init__()
        name = "PackedLinear"
        self.format = next((key for key, cls in FORMATS.items() if type(weight) is cls), "")
        if not self.format:
            wanted = "PackedNM, PackedBitmask, PackedBlocks or PackedGroups"
            raise InputTypeError(f"{name}: weight must be {wanted}, got {type(weight).__name__}.")
        if len(weight.shape) != 2:
            raise fail(name, "weight", "have 2 dimensions", f"shape {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.transposed = transposed
        self._held = "scales" if self.format == "groups" else "values"
        self._fixed: dict[str, Any] = {}  # what of the format is no tensor
        for field in fields(weight):
            value = getattr(weight, field.name)
            if isinstance(value, Tensor):
                self.register_buffer(field.name, value)
            else:
                self._fixed[field.name] = value
        if bias is not None:
            check_shape(name, "bias", bias, self.out_features)
        if dense is not None:
            check_shape(name, "dense", dense, *weight.shape)
        self.bias = None if bias is None else bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.register_buffer("dense", None if dense is None else dense.detach(), persistent=False)

    @property
    def packed(self) -> Packed:
        """The packed weight, sharing memory with this module."""
        cls: Any = FORMATS[self.format]
        weight: Packed = cls(**{f.name: self._fixed.get(f.name, getattr(self, f.name, None)) for f in fields(cls)})
        return weight

    @property
    def weight(self) -> Tensor:
        """The dense weight as the layer that this one stands for stores it; unpacked anew unless it is kept."""
        weight = self.packed.unpack() if self.dense is None else self.dense
        return weight.t() if self.transposed else weight

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        held: Tensor = getattr(self, self._held)
        return held.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is held, a dense one beside it included."""
        return self.packed.nbytes + (0 if self.dense is None else self.dense.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., out]`` from ``[..., in]``."""
        # Every line here counts: a small layer takes less than a few calls of Python.
        parts: dict[str, Any] = self._buffers
        held, bias, size = parts[self._held], self.bias, self.in_features
        if x.dtype != held.dtype or not x.ndim or x.shape[-1] != size or not self._fits(x, held, bias):
            return self._checked(x)
        tokens = x.reshape(x.numel() // size, size)
        if parts["dense"] is not None and tokens.shape[0] > packed_op.MAX_TOKENS:
            return F.linear(x, parts["dense"], bias)
        out: Tensor
        if self.format == "nm":
            out = packed_op.run_bits(tokens, held, parts["bits"], None, bias)
        elif self.format == "bitmask":
            out = packed_op.run_bits(tokens, held, parts["bits"], parts["row_offsets"], bias)
        elif self.format == "blocks":
            out = packed_op.run_blocks(tokens, held, parts["columns"], parts["row_offsets"], bias)
        else:
            groups = (parts["codes"], held, parts["zeros"], parts["columns"], parts["row_offsets"])
            out = packed_op.run_groups(tokens, groups, bias)
        return out.view(*x.shape[:-1], self.out_features)

    @staticmethod
    def _fits(x: Tensor, held: Tensor, bias: Tensor | None) -> bool:
        """Whether ``x`` may go to the kernels without the checks; they would read wrong memory."""
        same = x.device == held.device and (bias is None or (bias.dtype, bias.device) == (x.dtype, x.device))
        return same and not torch.is_autocast_enabled(x.device.type)

    def _checked(self, x: Tensor) -> Tensor:
        """With all that can be wrong named, and autocast heeded."""
        if not torch.is_autocast_enabled(x.device.type):
            return packed_linear(x, self.packed, self.bias)
        return packed_linear(x.to(self.dtype), self.packed, self.bias).to(torch.get_autocast_dtype(x.device.type))

    def extra_repr(self) -> str:
        """What is held."""
        kept = ", dense beside" if self.dense is not None else ""
        return f"{self.packed!r}, bias={self.bias is not None}{kept}"
