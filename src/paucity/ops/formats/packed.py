"""Packed weights: ``PackedNM`` (at most N of every M) and ``PackedBitmask`` (any pattern), exact both ways.

Both store a zero as absent, so ``-0.0`` comes back as ``0.0``; every other value, NaN and infinities included, comes
back bit for bit. Packing detaches: these are storage formats, not for autograd.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import InputTypeError, check_bool, check_divides, check_floating, check_int, check_nm, check_shape, fail


def pack_bits(mask: Tensor) -> Tensor:
    """Bool ``[..., n]`` to uint8 ``[..., ceil(n / 8)]``: entry ``i`` is bit ``i % 8`` (0 lowest) of byte ``i // 8``."""
    check_bool("pack_bits", "mask", mask)
    _check_matrix("pack_bits", "mask", mask, least=1)
    padded = F.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    packed = torch.zeros_like(padded[..., ::8])
    for bit in range(8):
        packed |= padded[..., bit::8] << bit
    return packed


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """The bool ``[..., size]`` that ``pack_bits`` took; ``packed`` is uint8 ``[..., ceil(size / 8)]``."""
    _check_dtype("unpack_bits", "packed", packed, torch.uint8)
    check_int("unpack_bits", "size", size, 0)
    check_shape("unpack_bits", "packed", packed, *packed.shape[:-1], -(-size // 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)[..., :size]


@dataclass(frozen=True, eq=False)
class PackedNM:
    """A weight ``[..., rows, cols]`` with at most ``n`` nonzeros in every ``m`` consecutive columns.

    Attributes:
        values: ``[..., rows, cols * n / m]``, the weight's dtype, by column; a group with fewer nonzeros is filled up
            with zeros.
        bits: uint8 ``[..., rows, ceil(cols / 8)]`` as `pack_bits` lays them: where the values stand, ``n`` in every
            group. The zeros that fill up a group take its first free places.
        n: values kept of a group.
        m: columns of a group, at most 16.
    """

    values: Tensor
    bits: Tensor
    n: int
    m: int

    def __post_init__(self) -> None:
        """Raise InputError unless the parts fit together."""
        _check_group("PackedNM", self.n, self.m)
        check_floating("PackedNM", "values", self.values)
        _check_matrix("PackedNM", "values", self.values, least=2)
        check_divides("PackedNM", "n", self.n, self.values.shape[-1], "the last size of values")
        _check_dtype("PackedNM", "bits", self.bits, torch.uint8)
        check_shape("PackedNM", "bits", self.bits, *self.values.shape[:-1], -(-self.shape[-1] // 8))

    @classmethod
    def pack(cls, weight: Tensor, n: int, m: int) -> Self:
        """Pack ``weight`` ``[..., rows, cols]`` (any float dtype; ``m`` divides ``cols``).

        Raises:
            InputError: if a group has more than ``n`` nonzeros (the first is named), or a size or type does not fit.
        """
        _check_group("PackedNM.pack", n, m)
        check_floating("PackedNM.pack", "weight", weight)
        _check_matrix("PackedNM.pack", "weight", weight, least=2)
        check_divides("PackedNM.pack", "m", m, weight.shape[-1], "the columns of weight")
        groups = weight.detach().reshape(*weight.shape[:-1], weight.shape[-1] // m, m)
        kept = groups != 0
        counts = kept.sum(-1)
        if (counts > n).any():
            *row, group = (counts > n).nonzero()[0].tolist()
            found = f"{counts[(*row, group)]} in row {row}, columns {group * m} to {group * m + m - 1}"
            raise fail("PackedNM.pack", "weight", f"have at most {n} nonzeros in every {m} columns", found)
        places = kept | ((~kept).cumsum(-1) <= n - counts.unsqueeze(-1))
        values = torch.where(groups != 0, groups, 0)[places]  # -0.0 is packed as 0.0
        return cls(values.view(*weight.shape[:-1], counts.shape[-1] * n), pack_bits(places.flatten(-2)), n, m)

    def columns(self) -> Tensor:
        """Column of each value in the dense weight: int64, the shape of ``values``."""
        return self._mask().nonzero()[:, -1].view(self.values.shape)

    def unpack(self) -> Tensor:
        """The dense weight ``[..., rows, cols]``."""
        return self.values.new_zeros(self.shape).masked_scatter_(self._mask(), self.values)

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense weight."""
        return torch.Size((*self.values.shape[:-1], self.values.shape[-1] // self.n * self.m))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return self.values.nbytes + self.bits.nbytes

    @property
    def compression(self) -> float:
        """Bytes of the dense weight over ``nbytes``; 1.0 for an empty weight."""
        return _compression(self.shape, self.values, self.nbytes)

    def to(self, device: torch.device | str) -> Self:
        """The same on ``device``."""
        return type(self)(self.values.to(device), self.bits.to(device), self.n, self.m)

    def tensors(self) -> dict[str, Tensor]:
        """All that ``from_tensors`` needs, as tensors for safetensors: values, bits and ``nm`` (int64 ``[2]``)."""
        return {"values": self.values, "bits": self.bits, "nm": torch.tensor([self.n, self.m])}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Back from ``tensors()``.

        Raises:
            InputError: if a tensor is missing or does not fit, or a group has not ``n`` bits.
        """
        _check_keys("PackedNM.from_tensors", tensors, ("values", "bits", "nm"))
        check_shape("PackedNM.from_tensors", "nm", tensors["nm"], 2)
        n, m = map(int, tensors["nm"].tolist())
        packed = cls(tensors["values"], tensors["bits"], n, m)
        groups = packed._mask().reshape(*packed.values.shape[:-1], packed.shape[-1] // m, m)
        if (groups.sum(-1) != n).any():
            raise fail("PackedNM.from_tensors", "bits", f"have {n} set in every group of {m}", "others")
        return packed

    def _mask(self) -> Tensor:
        return unpack_bits(self.bits, self.shape[-1])

    def __repr__(self) -> str:
        """Pattern, dense shape, dtype and compression."""
        return f"PackedNM({self.n}:{self.m}, {_describe(self.shape, self.values)}, {self.compression:.2f}x smaller)"


@dataclass(frozen=True, eq=False)
class PackedBitmask:
    """A weight of any zeros pattern: one bit per entry, and the nonzeros row by row.

    Attributes:
        values: ``[num_nonzeros]``, the weight's dtype, rows after each other.
        bits: uint8 ``[rows, ceil(cols / 8)]`` as ``pack_bits`` lays them; rows are all leading dimensions flattened.
        row_offsets: ``[rows + 1]``; row ``r`` holds ``values[row_offsets[r] : row_offsets[r + 1]]``. int32, or
            int64 where the weight has too many entries for that.
        shape: of the dense weight.
    """

    values: Tensor
    bits: Tensor
    row_offsets: Tensor
    shape: torch.Size

    def __post_init__(self) -> None:
        """Raise InputError unless the parts fit together."""
        check_floating("PackedBitmask", "values", self.values)
        check_shape("PackedBitmask", "values", self.values, None)
        rows, cols = math.prod(self.shape[:-1]), self.shape[-1]
        _check_dtype("PackedBitmask", "bits", self.bits, torch.uint8)
        check_shape("PackedBitmask", "bits", self.bits, rows, -(-cols // 8))
        _check_dtype("PackedBitmask", "row_offsets", self.row_offsets, torch.int32, torch.int64)
        check_shape("PackedBitmask", "row_offsets", self.row_offsets, rows + 1)

    @classmethod
    def pack(cls, weight: Tensor) -> Self:
        """Pack ``weight`` ``[..., cols]`` (any float dtype, at least one dimension)."""
        check_floating("PackedBitmask.pack", "weight", weight)
        _check_matrix("PackedBitmask.pack", "weight", weight, least=1)
        rows = weight.detach().reshape(math.prod(weight.shape[:-1]), weight.shape[-1])
        mask = rows != 0
        offsets = F.pad(mask.sum(-1).cumsum(0), (1, 0))
        small = mask.numel() <= torch.iinfo(torch.int32).max
        return cls(rows[mask], pack_bits(mask), offsets.to(torch.int32) if small else offsets, weight.shape)

    def mask(self) -> Tensor:
        """Bool of the dense shape, True where a value is stored."""
        return unpack_bits(self.bits, self.shape[-1]).view(self.shape)

    def unpack(self) -> Tensor:
        """The dense weight."""
        return self.values.new_zeros(self.shape).masked_scatter_(self.mask(), self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return self.values.nbytes + self.bits.nbytes + self.row_offsets.nbytes

    @property
    def compression(self) -> float:
        """Bytes of the dense weight over ``nbytes``; under 1 where packing does not pay; 1.0 for an empty weight."""
        return _compression(self.shape, self.values, self.nbytes)

    def to(self, device: torch.device | str) -> Self:
        """The same on ``device``."""
        return type(self)(self.values.to(device), self.bits.to(device), self.row_offsets.to(device), self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """All that ``from_tensors`` needs, as tensors for safetensors; ``shape`` is int64."""
        shape = torch.tensor(self.shape, dtype=torch.int64)
        return {"values": self.values, "bits": self.bits, "row_offsets": self.row_offsets, "shape": shape}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Back from ``tensors()``.

        Raises:
            InputError: if a tensor is missing or does not fit, or the row offsets do not agree with the bits.
        """
        _check_keys("PackedBitmask.from_tensors", tensors, ("values", "bits", "row_offsets", "shape"))
        _check_matrix("PackedBitmask.from_tensors", "shape", tensors["shape"], least=1)
        packed = cls(
            tensors["values"], tensors["bits"], tensors["row_offsets"], torch.Size(map(int, tensors["shape"].tolist()))
        )
        counts = unpack_bits(packed.bits, packed.shape[-1]).sum(-1)
        if not torch.equal(packed.row_offsets.long(), F.pad(counts.cumsum(0), (1, 0))):
            raise fail("PackedBitmask.from_tensors", "row_offsets", "count the set bits of each row", "others")
        check_shape("PackedBitmask.from_tensors", "values", packed.values, int(counts.sum()))
        return packed

    def __repr__(self) -> str:
        """Dense shape, dtype, stored values and compression."""
        held = f"{_describe(self.shape, self.values)}, {self.values.numel()} values"
        return f"PackedBitmask({held}, {self.compression:.2f}x smaller)"


def _check_group(function: str, n: int, m: int) -> None:
    check_int(function, "m", m, 1, 16)
    check_nm(function, n, m)


def _check_matrix(function: str, argument: str, tensor: Tensor, *, least: int) -> None:
    if tensor.ndim < least:
        raise fail(function, argument, f"have at least {least} dimension(s)", f"shape {list(tensor.shape)}")


def _check_dtype(function: str, argument: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise InputTypeError(f"{function}: {argument} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}.")


def _check_keys(function: str, tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    if missing := [name for name in names if name not in tensors]:
        raise fail(function, "tensors", f"hold {', '.join(names)}", f"none named {', '.join(missing)}")


def _compression(shape: torch.Size, values: Tensor, nbytes: int) -> float:
    return shape.numel() * values.element_size() / nbytes if shape.numel() else 1.0


def _describe(shape: torch.Size, values: Tensor) -> str:
    return f"{list(shape)} {str(values.dtype).removeprefix('torch.')}"
