"""Packed weights of dense blocks: whole blocks are stored or absent, row of blocks by row of blocks (BSR)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import InputTypeError, check_divides, check_floating, check_int, check_ndim, check_shape, fail


@dataclass(frozen=True, eq=False)
class PackedBlocks:
    """A weight ``[rows, cols]`` of which whole blocks ``[br, bc]`` are zero; the others are stored.

    Values in a stored block come back bit for bit, ``-0.0`` included; a block of nothing but zeros is absent. Packing
    detaches: this is a storage format, not for autograd.

    Attributes:
        values: ``[num_blocks, br, bc]``, the weight's dtype: the blocks of the first block row, by column, then on.
        columns: int32 ``[num_blocks]``: block ``b`` starts at column ``columns[b] * bc``; ascending in a block row.
        row_offsets: int32 ``[rows / br + 1]``: block row ``r`` has blocks ``row_offsets[r]`` to ``row_offsets[r + 1]``.
        shape: of the dense weight.
    """

    values: Tensor
    columns: Tensor
    row_offsets: Tensor
    shape: torch.Size

    def __post_init__(self) -> None:
        """Raise InputError unless the parts fit together."""
        check_floating("PackedBlocks", "values", self.values)
        check_ndim("PackedBlocks", "values", self.values, 3)
        rows, _ = _check_block("PackedBlocks", self.shape, self.block)
        for name, tensor, size in (
            ("columns", self.columns, len(self.values)),
            ("row_offsets", self.row_offsets, rows + 1),
        ):
            if tensor.dtype != torch.int32:
                raise InputTypeError(f"PackedBlocks: {name} must be torch.int32, got {tensor.dtype}.")
            check_shape("PackedBlocks", name, tensor, size)

    @classmethod
    def pack(cls, weight: Tensor, block: tuple[int, int]) -> Self:
        """Pack ``weight`` ``[rows, cols]`` (any float dtype); ``block`` is ``(br, bc)``, which divide rows and columns.

        Raises:
            InputError: if a size or a type does not fit.
        """
        check_floating("PackedBlocks.pack", "weight", weight)
        check_ndim("PackedBlocks.pack", "weight", weight, 2)
        rows, cols = _check_block("PackedBlocks.pack", weight.shape, block)
        grid = weight.detach().reshape(rows, block[0], cols, block[1]).transpose(1, 2)
        kept = (grid != 0).any(-1).any(-1)
        columns = torch.arange(cols, dtype=torch.int32, device=weight.device).expand(rows, cols)[kept]
        offsets = F.pad(kept.sum(-1).cumsum(0), (1, 0)).to(torch.int32)
        return cls(grid[kept], columns, offsets, weight.shape)

    @property
    def block(self) -> tuple[int, int]:
        """``(br, bc)``: rows and columns of a block."""
        return self.values.shape[1], self.values.shape[2]

    def mask(self) -> Tensor:
        """Bool ``[rows / br, cols / bc]``, True where a block is stored."""
        rows, cols = self.shape[0] // self.block[0], self.shape[1] // self.block[1]
        stored = torch.zeros(rows, cols, dtype=torch.bool, device=self.values.device)
        stored[self._block_rows(), self.columns.long()] = True
        return stored

    def unpack(self) -> Tensor:
        """The dense weight."""
        (br, bc), (rows, cols) = self.block, self.shape
        grid = self.values.new_zeros(rows // br, cols // bc, br, bc)
        grid[self._block_rows(), self.columns.long()] = self.values
        return grid.transpose(1, 2).reshape(rows, cols)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return self.values.nbytes + self.columns.nbytes + self.row_offsets.nbytes

    @property
    def compression(self) -> float:
        """Bytes of the dense weight over ``nbytes``; under 1 where packing does not pay; 1.0 for an empty weight."""
        return math.prod(self.shape) * self.values.element_size() / self.nbytes if math.prod(self.shape) else 1.0

    def to(self, device: torch.device | str) -> Self:
        """The same on ``device``."""
        return type(self)(self.values.to(device), self.columns.to(device), self.row_offsets.to(device), self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """All that ``from_tensors`` needs, as tensors for safetensors; ``shape`` is int64 ``[2]``."""
        shape = torch.tensor(self.shape, dtype=torch.int64)
        return {"values": self.values, "columns": self.columns, "row_offsets": self.row_offsets, "shape": shape}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Back from ``tensors()``.

        Raises:
            InputError: if a tensor is missing or does not fit, offsets do not ascend to the number of blocks, or
                columns do not ascend in a block row.
        """
        name, keys = "PackedBlocks.from_tensors", ("values", "columns", "row_offsets", "shape")
        if missing := [key for key in keys if key not in tensors]:
            raise fail(name, "tensors", f"hold {', '.join(keys)}", f"none named {', '.join(missing)}")
        check_shape(name, "shape", tensors["shape"], 2)
        shape = torch.Size(map(int, tensors["shape"].tolist()))
        packed = cls(tensors["values"], tensors["columns"], tensors["row_offsets"], shape)
        offsets, count = packed.row_offsets, len(packed.values)
        if (offsets.diff() < 0).any() or int(offsets[0]) or int(offsets[-1]) != count:
            raise fail(name, "row_offsets", f"ascend from 0 to {count}", "others")
        cols = shape[1] // packed.block[1]
        along = packed._block_rows() * cols + packed.columns  # ascends over the whole weight
        if ((packed.columns < 0) | (packed.columns >= cols)).any() or (along.diff() <= 0).any():
            raise fail(name, "columns", f"ascend below {cols} in each block row", "others")
        return packed

    def _block_rows(self) -> Tensor:
        return torch.repeat_interleave(self.row_offsets.diff().long())

    def __repr__(self) -> str:
        """Block size, dense shape, dtype, stored blocks and compression."""
        kind = f"{list(self.shape)} {str(self.values.dtype).removeprefix('torch.')}"
        (br, bc), count = self.block, len(self.values)
        return f"PackedBlocks({br}x{bc}, {kind}, {count} blocks, {self.compression:.2f}x smaller)"


def _check_block(function: str, shape: torch.Size, block: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of blocks."""
    if len(block) != 2 or len(shape) != 2:
        raise fail(function, "block", "have 2 sizes, as the weight", f"{tuple(block)} for {list(shape)}")
    for size, whole, what in zip(block, shape, ("the rows of weight", "the columns of weight"), strict=True):
        check_int(function, "block", size)
        check_divides(function, "block", size, whole, what)
    return shape[0] // block[0], shape[1] // block[1]
