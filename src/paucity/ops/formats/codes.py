"""Sparse codes that stay (values, indices) from end to end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import InputTypeError, check_floating, check_int, check_shape, check_tensor, fail


@dataclass(frozen=True, eq=False)
class Codes:
    """Rows over a dictionary of ``dict_size`` atoms, each row held as ``k`` signed values and their atoms.

    A slot with value 0 is padding and adds nothing; an atom named twice in a row counts with the sum of its values.
    Making one checks that all indices are in range (on a GPU this waits for them).

    Attributes:
        values: ``[..., k]``, any float dtype.
        indices: ``[..., k]``, int64 or int32, each in ``[0, dict_size)``.
        dict_size: number of atoms.
    """

    values: Tensor
    indices: Tensor
    dict_size: int

    def __post_init__(self) -> None:
        """Raise InputError unless the parts fit together."""
        check_floating("Codes", "values", self.values)
        check_tensor("Codes", "indices", self.indices)
        if self.indices.dtype not in (torch.int64, torch.int32):
            raise InputTypeError(f"Codes: indices must be torch.int64 or torch.int32, got {self.indices.dtype}.")
        if self.values.ndim == 0:
            raise fail("Codes", "values", "have at least 1 dimension", "shape []")
        check_shape("Codes", "indices", self.indices, *self.values.shape)
        if self.indices.device != self.values.device:
            raise fail("Codes", "indices", f"be on {self.values.device} like values", self.indices.device)
        check_int("Codes", "dict_size", self.dict_size)
        if self.indices.numel():
            low, high = (int(end) for end in self.indices.aminmax())
            if low < 0 or high >= self.dict_size:
                raise fail("Codes", "indices", f"be in [0, {self.dict_size})", low if low < 0 else high)

    @classmethod
    def from_dense(cls, x: Tensor, k: int | None = None) -> Self:
        """All nonzeros of ``x`` ``[..., dict_size]`` in ascending atom order, padded with value 0 to ``k`` slots.

        Gradients flow from the nonzeros to ``x``.

        Args:
            x: any float dtype.
            k: slots of a row; None is the largest number of nonzeros in a row.

        Raises:
            InputError: if a row has more than ``k`` nonzeros; choosing among them is a selector's work.
        """
        check_floating("Codes.from_dense", "x", x)
        if x.ndim == 0:
            raise fail("Codes.from_dense", "x", "have at least 1 dimension", "shape []")
        check_int("Codes.from_dense", "the last size of x", x.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        mask = rows != 0
        counts = mask.sum(-1)
        most = int(counts.max()) if counts.numel() else 0
        if k is None:
            k = most
        check_int("Codes.from_dense", "k", k, 0)
        if most > k:
            raise fail("Codes.from_dense", "k", f"be at least the nonzeros of every row ({most})", k)
        filled = torch.arange(k, device=x.device) < counts.unsqueeze(-1)
        indices = torch.zeros(filled.shape, dtype=torch.int64, device=x.device)
        indices[filled] = mask.nonzero()[:, 1]
        values = torch.where(filled, rows.gather(-1, indices), 0)
        shape = (*x.shape[:-1], k)
        return cls(values.view(shape), indices.view(shape), x.shape[-1])

    @classmethod
    def concat(cls, codes: Sequence["Codes"], dim: int = 0) -> Self:
        """Join along the leading dimension ``dim``; rows with fewer slots are padded with value 0 to the largest ``k``.

        Raises:
            InputError: if there are none, or they differ in ``dict_size`` or in another leading size.
        """
        if not codes:
            raise fail("Codes.concat", "codes", "hold at least one", "none")
        first, k = codes[0], max(each.k for each in codes)
        check_int("Codes.concat", "dim", dim, 0, first.values.ndim - 2)
        for each in codes:
            if each.dict_size != first.dict_size:
                raise fail("Codes.concat", "codes", f"all have dict_size {first.dict_size}", each.dict_size)
            wanted: list[int | None] = list(first.values.shape[:-1])
            wanted[dim] = None
            check_shape("Codes.concat", "values of codes", each.values, *wanted, None)
        values = torch.cat([F.pad(each.values, (0, k - each.k)) for each in codes], dim)
        indices = torch.cat([F.pad(each.indices, (0, k - each.k)) for each in codes], dim)
        return cls(values, indices, first.dict_size)

    @property
    def k(self) -> int:
        """Slots of a row."""
        return self.values.shape[-1]

    def to_dense(self) -> Tensor:
        """``[..., dict_size]`` in the dtype of the values; differentiable in them."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.dict_size)
        return dense.scatter_add(-1, self.indices.long(), self.values)

    def decode(self, dictionary: Tensor) -> Tensor:
        """Weighted sum of the rows of ``dictionary`` that each code names: ``[..., d]``.

        Only those rows are read, and none of them is copied out; differentiable once in the values and the dictionary.

        Args:
            dictionary: ``[dict_size, d]``, the dtype and device of the values.
        """
        check_shape("Codes.decode", "dictionary", dictionary, self.dict_size, None)
        if dictionary.dtype != self.values.dtype:
            raise InputTypeError(
                f"Codes.decode: dictionary must be {self.values.dtype} like the values, got {dictionary.dtype}."
            )
        shape = (*self.values.shape[:-1], dictionary.shape[1])
        if not self.values.numel():
            return (self.values.unsqueeze(-1) * dictionary[self.indices.long()]).sum(-2)
        rows = F.embedding_bag(
            self.indices.reshape(-1, self.k),
            dictionary,
            mode="sum",
            per_sample_weights=self.values.reshape(-1, self.k),
        )
        return rows.view(shape)

    def l0(self) -> Tensor:
        """Atoms of each row with a value other than 0, one that is named twice counting once: int64 ``[...]``."""
        used = self.values != 0
        named = torch.where(used, self.indices, self.dict_size).sort(dim=-1).values
        return used.sum(-1) - ((named[..., 1:] == named[..., :-1]) & (named[..., 1:] < self.dict_size)).sum(-1)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same on ``device``, with values of ``dtype``; None leaves as is."""
        values = self.values.to(device=device, dtype=dtype)
        return type(self)(values, self.indices.to(device=device), self.dict_size)

    def __getitem__(self, key: Any) -> Self:
        """Index the leading dimensions as a tensor; slots cannot be indexed."""
        key = key if isinstance(key, tuple) else (key,)
        try:
            return type(self)(self.values[(*key, slice(None))], self.indices[(*key, slice(None))], self.dict_size)
        except IndexError as error:
            raise IndexError(
                f"Codes: key must index leading dimensions {list(self.values.shape[:-1])}: {error}"
            ) from None

    def __repr__(self) -> str:
        """Leading shape, slots, dictionary size and dtype."""
        kind = str(self.values.dtype).removeprefix("torch.")
        return f"Codes({list(self.values.shape[:-1])}, k={self.k}, dict_size={self.dict_size}, {kind})"
