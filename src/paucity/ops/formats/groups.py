"""Packed weights of groups along a row: whole groups are absent, the others hold 4 bits a weight.

Paper: GQSA, Zeng et al. 2024, https://arxiv.org/abs/2412.17560: rows of a weight are pruned by groups, the groups that
stay are stored as the blocks of a BSR matrix and quantised with a scale and a zero point each. Here: that format and
rounding to the nearest; `paucity.weights.gqsa` chooses the groups and trains weights, scales and zero points.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import (
    InputTypeError,
    check_bool,
    check_divides,
    check_floating,
    check_int,
    check_ndim,
    check_shape,
    fail,
)

_TOP = 15  # the highest number in 4 bits


@dataclass(frozen=True, eq=False)
class PackedGroups:
    """A weight ``[rows, cols]`` of which whole groups along a row are zero; the others are stored as 4-bit numbers.

    A weight is ``(q - zero) * scale``, computed in float32 (float64 for float64) and rounded to the dtype. Which groups
    stay is a selector's work:

        >>> from paucity.ops.select import block_topk_mask
        >>> weight = torch.randn(8, 64)
        >>> mask = block_topk_mask(weight.abs(), block=(1, 16), sparsity=0.5)
        >>> PackedGroups.pack(weight * mask, group_size=16)
        PackedGroups(16 x 4 bits, [8, 64] float32, 16 groups, 7.42x smaller)

    Packing rounds and detaches: this is a storage format, not for autograd.

    Attributes:
        codes: uint8 ``[num_groups, group_size / 2]``: the groups of the first row, by column, then on; weight ``i`` of
            a group is in byte ``i // 2``, the low half if ``i`` is even.
        scales: ``[num_groups]`` in the dtype of the weight.
        zeros: uint8 ``[num_groups]``, 0 to 15.
        columns: ``[num_groups]``: group ``g`` starts at column ``columns[g] * group_size``; ascending in a row. int16,
            or int32 where a row has too many groups for that.
        row_offsets: int32 ``[rows + 1]``: row ``r`` has the groups ``row_offsets[r]`` to ``row_offsets[r + 1]``.
        shape: of the dense weight.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    columns: Tensor
    row_offsets: Tensor
    shape: torch.Size

    def __post_init__(self) -> None:
        """Raise InputError unless the parts fit together."""
        name = "PackedGroups"
        _check_dtype(name, "codes", self.codes, torch.uint8)
        check_ndim(name, "codes", self.codes, 2)
        if len(self.shape) != 2:
            raise fail(name, "shape", "have 2 sizes", list(self.shape))
        _check_group(name, self.group_size, self.shape[1])
        check_floating(name, "scales", self.scales)
        _check_dtype(name, "zeros", self.zeros, torch.uint8)
        _check_dtype(name, "columns", self.columns, torch.int16, torch.int32)
        _check_dtype(name, "row_offsets", self.row_offsets, torch.int32)
        for part in ("scales", "zeros", "columns"):
            check_shape(name, part, getattr(self, part), len(self.codes))
        check_shape(name, "row_offsets", self.row_offsets, self.shape[0] + 1)

    @classmethod
    def pack(cls, weight: Tensor, group_size: int = 16, bits: int = 4) -> Self:
        """Pack the groups of ``weight`` ``[rows, cols]`` (any float dtype) that are not all zero.

        The range of a group, widened to include 0, is divided into 15 steps; each weight goes to the nearest. A zero
        in a stored group comes back as zero.

        Args:
            weight: finite.
            group_size: even; it divides the columns.
            bits: of a weight; 4 is all there is.

        Raises:
            InputError: if a size, a type or a value does not fit.
        """
        name = "PackedGroups.pack"
        check_floating(name, "weight", weight)
        check_ndim(name, "weight", weight, 2)
        check_int(name, "group_size", group_size)
        _check_group(name, group_size, weight.shape[1])
        if bits != 4:
            raise fail(name, "bits", "be 4", bits)
        rows, cols = weight.shape[0], weight.shape[1] // group_size
        grid = weight.detach().reshape(rows, cols, group_size)
        kept = (grid != 0).any(-1)
        groups = grid[kept].to(torch.promote_types(weight.dtype, torch.float32))
        if not groups.isfinite().all():
            raise fail(name, "weight", "be finite", "others")
        scales, zeros = group_range(groups, 4, weight.dtype)
        codes = (groups / scales.to(groups.dtype)[:, None] + zeros[:, None]).round().clamp(0, _TOP).to(torch.uint8)
        return cls.from_codes(codes, scales, zeros, kept)

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, zeros: Tensor, kept: Tensor) -> Self:
        """The stored form of groups that are numbers already.

        Args:
            codes: uint8 ``[num_groups, group_size]``, 0 to 15: the groups of the first row, by column, then on.
            scales: ``[num_groups]`` in the dtype of the weight.
            zeros: uint8 ``[num_groups]``, 0 to 15.
            kept: bool ``[rows, cols / group_size]``, True where a group is stored.

        Raises:
            InputError: if a size or a type does not fit.
        """
        name = "PackedGroups.from_codes"
        check_ndim(name, "codes", codes, 2)
        check_ndim(name, "kept", kept, 2)
        check_bool(name, "kept", kept)
        check_shape(name, "codes", codes, int(kept.sum()), None)
        (rows, cols), size = kept.shape, codes.shape[1]
        _check_group(name, size, size)
        column = torch.int16 if cols <= torch.iinfo(torch.int16).max + 1 else torch.int32
        columns = torch.arange(cols, device=kept.device).to(column).expand(rows, cols)[kept]
        offsets = F.pad(kept.sum(-1).cumsum(0), (1, 0)).to(torch.int32)
        pairs = codes[:, ::2] | codes[:, 1::2] << 4
        return cls(pairs, scales, zeros, columns, offsets, torch.Size((rows, cols * size)))

    @property
    def group_size(self) -> int:
        """Weights in a group."""
        return 2 * self.codes.shape[1]

    def mask(self) -> Tensor:
        """Bool ``[rows, cols / group_size]``, True where a group is stored."""
        stored = torch.zeros(
            self.shape[0], self.shape[1] // self.group_size, dtype=torch.bool, device=self.codes.device
        )
        stored[self._rows(), self.columns.long()] = True
        return stored

    def unpack(self) -> Tensor:
        """The dense weight: what the stored numbers stand for, 0 elsewhere."""
        rows, cols = self.shape
        grid = self.scales.new_zeros(rows, cols // self.group_size, self.group_size)
        grid[self._rows(), self.columns.long()] = dequantize_groups(self.codes, self.scales, self.zeros)
        return grid.view(rows, cols)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros, self.columns, self.row_offsets))

    @property
    def compression(self) -> float:
        """Bytes of the dense weight over ``nbytes``; 1.0 for an empty weight."""
        return math.prod(self.shape) * self.scales.element_size() / self.nbytes if math.prod(self.shape) else 1.0

    def to(self, device: torch.device | str) -> Self:
        """The same on ``device``."""
        parts = (self.codes, self.scales, self.zeros, self.columns, self.row_offsets)
        codes, scales, zeros, columns, row_offsets = (part.to(device) for part in parts)
        return type(self)(codes, scales, zeros, columns, row_offsets, self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """All that ``from_tensors`` needs, as tensors for safetensors; ``shape`` is int64 ``[2]``."""
        parts = {name: getattr(self, name) for name in ("codes", "scales", "zeros", "columns", "row_offsets")}
        return {**parts, "shape": torch.tensor(self.shape, dtype=torch.int64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Back from ``tensors()``.

        Raises:
            InputError: if a tensor is missing or does not fit, a scale is not finite, a zero point is above 15, offsets
                do not ascend to the number of groups, or columns do not ascend in a row.
        """
        name, keys = "PackedGroups.from_tensors", ("codes", "scales", "zeros", "columns", "row_offsets", "shape")
        if missing := [key for key in keys if key not in tensors]:
            raise fail(name, "tensors", f"hold {', '.join(keys)}", f"none named {', '.join(missing)}")
        check_shape(name, "shape", tensors["shape"], 2)
        shape = torch.Size(map(int, tensors["shape"].tolist()))
        codes, scales, zeros, columns, row_offsets = (tensors[key] for key in keys[:-1])
        packed = cls(codes, scales, zeros, columns, row_offsets, shape)
        if not packed.scales.isfinite().all():
            raise fail(name, "scales", "be finite", "others")
        if (packed.zeros > _TOP).any():
            raise fail(name, "zeros", f"be at most {_TOP}", int(packed.zeros.max()))
        offsets, count = packed.row_offsets, len(packed.codes)
        if (offsets.diff() < 0).any() or int(offsets[0]) or int(offsets[-1]) != count:
            raise fail(name, "row_offsets", f"ascend from 0 to {count}", "others")
        cols = shape[1] // packed.group_size
        along = packed._rows() * cols + packed.columns  # ascends over the whole weight
        if ((packed.columns < 0) | (packed.columns >= cols)).any() or (along.diff() <= 0).any():
            raise fail(name, "columns", f"ascend below {cols} in each row", "others")
        return packed

    def _rows(self) -> Tensor:
        return torch.repeat_interleave(self.row_offsets.diff().long())

    def __repr__(self) -> str:
        """Group size, bits, dense shape, dtype, stored groups and compression."""
        kind = f"{list(self.shape)} {str(self.scales.dtype).removeprefix('torch.')}"
        held = f"{self.group_size} x 4 bits, {kind}, {len(self.codes)} groups"
        return f"PackedGroups({held}, {self.compression:.2f}x smaller)"


def group_range(groups: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale (in ``dtype``) and zero point (uint8) of each of ``groups`` ``[num_groups, group_size]``, both
    ``[num_groups]``: the range of a group, widened to include 0, is divided into ``2**bits - 1`` steps.
    """
    top = 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = (high / top - low / top).to(dtype)
    scales = torch.where(scales == 0, torch.finfo(dtype).tiny, scales)  # tiny weights round to nothing
    return scales, (-low / scales.to(groups.dtype)).round().clamp(0, top).to(torch.uint8)


def dequantize_groups(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The weights of groups, ``[num_groups, group_size]`` in the dtype of the scales; see `PackedGroups`."""
    wide = torch.promote_types(scales.dtype, torch.float32)
    numbers = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return ((numbers.to(wide) - zeros.to(wide)[:, None]) * scales.to(wide)[:, None]).to(scales.dtype)


def _check_group(function: str, group_size: int, cols: int) -> None:
    if group_size < 2 or group_size % 2:
        raise fail(function, "group_size", "be even, at least 2", group_size)
    check_divides(function, "group_size", group_size, cols, "the columns of weight")


def _check_dtype(function: str, argument: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise InputTypeError(f"{function}: {argument} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}.")
