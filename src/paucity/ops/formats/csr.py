"""``PackedCSR``: the nonzeros of a matrix row by row with their columns, for products that skip the zeros."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import InputTypeError, check_floating, check_shape, check_tensor, fail

_INT32 = torch.iinfo(torch.int32).max


@dataclass(frozen=True, eq=False)
class PackedCSR:
    """A matrix ``[out, in]`` or a 1x1 convolution's weight ``[out, in, 1, ...]`` in compressed sparse rows.

    A zero is stored as absent, so ``-0.0`` comes back as ``0.0``. Packing detaches; ``values`` may require gradients.

    Attributes:
        values: ``[num_nonzeros]``, any float dtype, rows after each other.
        columns: int32 ``[num_nonzeros]``, ascending within a row.
        row_offsets: int32 ``[out + 1]``; row ``r`` holds ``values[row_offsets[r] : row_offsets[r + 1]]``.
        shape: of the dense weight.
    """

    values: Tensor
    columns: Tensor
    row_offsets: Tensor
    shape: torch.Size

    def __post_init__(self) -> None:
        """Raise InputError unless the parts fit together; `from_tensors` also looks at the offsets and columns."""
        check_floating("PackedCSR", "values", self.values)
        check_shape("PackedCSR", "values", self.values, None)
        _check_weight_shape("PackedCSR", "shape", self.shape)
        for name, tensor in (("columns", self.columns), ("row_offsets", self.row_offsets)):
            check_tensor("PackedCSR", name, tensor)
            if tensor.dtype != torch.int32:
                raise InputTypeError(f"PackedCSR: {name} must be torch.int32, got {tensor.dtype}.")
            if tensor.device != self.values.device:
                raise fail("PackedCSR", name, f"be on {self.values.device} like values", tensor.device)
        check_shape("PackedCSR", "columns", self.columns, len(self.values))
        check_shape("PackedCSR", "row_offsets", self.row_offsets, self.shape[0] + 1)

    @classmethod
    def pack(cls, weight: Tensor) -> Self:
        """Pack the nonzeros of ``weight`` (``[out, in]`` or ``[out, in, 1, ...]``, any float dtype)."""
        check_floating("PackedCSR.pack", "weight", weight)
        _check_weight_shape("PackedCSR.pack", "weight", weight.shape)
        if weight.numel() > _INT32:
            raise fail("PackedCSR.pack", "weight", f"have at most {_INT32} entries", f"shape {list(weight.shape)}")
        rows = weight.detach().reshape(weight.shape[:2])
        mask = rows != 0
        offsets = F.pad(mask.sum(-1).cumsum(0), (1, 0))
        return cls(rows[mask], mask.nonzero()[:, 1].to(torch.int32), offsets.to(torch.int32), weight.shape)

    def rows(self) -> Tensor:
        """Row of each value: int64 ``[num_nonzeros]``."""
        counts = self.row_offsets.diff().long()
        row = torch.arange(self.shape[0], device=self.values.device)
        return row.repeat_interleave(counts, output_size=len(self.values))

    def unpack(self) -> Tensor:
        """The dense weight; differentiable in ``values``."""
        at = self.rows() * self.shape[1] + self.columns
        flat = self.values.new_zeros(math.prod(self.shape[:2]))
        return flat.index_put((at,), self.values).view(self.shape)

    def transpose(self) -> Self:
        """The transposed matrix, rows and columns exchanged; differentiable in ``values``."""
        order, columns, row_offsets = transposed_order(self)
        swapped = torch.Size((self.shape[1], self.shape[0], *self.shape[2:]))
        return type(self)(self.values[order], columns, row_offsets, swapped)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return self.values.nbytes + self.columns.nbytes + self.row_offsets.nbytes

    @property
    def compression(self) -> float:
        """Bytes of the dense weight over ``nbytes``; under 1 where packing does not pay; 1.0 for an empty weight."""
        return self.shape.numel() * self.values.element_size() / self.nbytes if self.shape.numel() else 1.0

    @property
    def density(self) -> float:
        """Stored values over entries of the dense weight; 0.0 for an empty weight."""
        return len(self.values) / max(1, self.shape.numel())

    def to(self, device: torch.device | str) -> Self:
        """The same on ``device``."""
        return type(self)(self.values.to(device), self.columns.to(device), self.row_offsets.to(device), self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """All that ``from_tensors`` needs, as tensors for safetensors; ``shape`` is int64."""
        shape = torch.tensor(self.shape, dtype=torch.int64)
        return {
            "values": self.values.detach(),
            "columns": self.columns,
            "row_offsets": self.row_offsets,
            "shape": shape,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Back from ``tensors()``.

        Raises:
            InputError: if a tensor is missing or does not fit, offsets do not ascend from 0 to the number of values, or
                columns do not ascend within their row.
        """
        names = ("values", "columns", "row_offsets", "shape")
        if missing := [name for name in names if name not in tensors]:
            wanted = f"hold {', '.join(names)}"
            raise fail("PackedCSR.from_tensors", "tensors", wanted, f"none named {', '.join(missing)}")
        check_shape("PackedCSR.from_tensors", "shape", tensors["shape"], None)
        shape = torch.Size(map(int, tensors["shape"].tolist()))
        packed = cls(tensors["values"], tensors["columns"], tensors["row_offsets"], shape)
        ends = packed.row_offsets[[0, -1]].tolist()
        if (packed.row_offsets.diff() < 0).any() or ends != [0, len(packed.values)]:
            wanted = f"ascend from 0 to the number of values ({len(packed.values)})"
            raise fail("PackedCSR.from_tensors", "row_offsets", wanted, "others")
        inside = (packed.columns >= 0) & (packed.columns < shape[1])
        at = packed.rows() * shape[1] + packed.columns
        if not inside.all() or (at.diff() <= 0).any():
            raise fail("PackedCSR.from_tensors", "columns", f"ascend below {shape[1]} in each row", "others")
        return packed

    def __repr__(self) -> str:
        """Dense shape, dtype, stored values and compression."""
        kind = str(self.values.dtype).removeprefix("torch.")
        return f"PackedCSR({list(self.shape)} {kind}, {len(self.values)} values, {self.compression:.2f}x smaller)"


def transposed_order(packed: PackedCSR) -> tuple[Tensor, Tensor, Tensor]:
    """Pattern of the transposed matrix: which value comes at each place (int64), its column, and the row offsets."""
    order = packed.columns.argsort(stable=True)
    counts = torch.zeros(packed.shape[1], dtype=torch.int64, device=packed.columns.device)
    counts.scatter_add_(0, packed.columns.long(), torch.ones_like(packed.columns, dtype=torch.int64))
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return order, packed.rows()[order].to(torch.int32), offsets.to(torch.int32)


def _check_weight_shape(function: str, argument: str, shape: torch.Size) -> None:
    if len(shape) < 2 or any(size != 1 for size in shape[2:]):
        raise fail(function, argument, "have the shape [out, in] or [out, in, 1, ...]", f"shape {list(shape)}")
