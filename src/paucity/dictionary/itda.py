"""ITDA: a dictionary of activations themselves, each added because those before could not make it.

Paper: Leask et al. 2025, https://arxiv.org/abs/2505.17769, Section 3. Batches are coded by matching pursuit on the
atoms so far; an activation whose squared error, relative to its squared norm, exceeds a threshold becomes an atom of
norm 1. Nothing is trained. Atoms know where they come from (prompt and token), so that dictionaries of two models on
the same text can be compared by the Jaccard index of their origins.

Within a batch the activations that are in error are admitted in their order, but for those that resemble an earlier
one; these are coded again with the new atoms. That keeps copies out, and the same order of text gives dictionaries of
two models that can be compared. Activations are coded by signed products, without an offset. The official code compares
directions alone (it admits where ``2 - 2 cos(x, x_hat)``, a mean over dimensions, exceeds the threshold), and starts
with the most frequent activations, as many as there are dimensions. Not implemented: that start, and the paper's
distributed construction.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_floating, check_int, check_range, check_shape, fail
from ..kernels.pursuit import matching_pursuit
from ..ops.formats import Codes
from .base import Dictionary
from .sources import as_source


class ITDA(Dictionary):
    """Activations as atoms.

    Args:
        input_size: width of an activation.
        dict_size: most atoms; construction ends when they are there.
        k: most steps of matching pursuit.
        threshold: share of an activation's squared norm that may stay unexplained; above it the activation is admitted.
        signed: whether codes may be negative.

    Attributes:
        atoms: ``[count, input_size]`` float32 so far; ``dict_size`` is the count once it is fit.
        origins: ``[count, 2]`` int64, prompt and token of each atom.
    """

    _atoms: Tensor
    origins: Tensor

    def __init__(
        self, input_size: int, dict_size: int, k: int = 32, *, threshold: float = 0.2, signed: bool = True
    ) -> None:
        super().__init__(input_size, dict_size)
        check_int("ITDA", "k", k)
        check_range("ITDA", "threshold", threshold, 0, 1, open_low=True, open_high=True)
        self.k, self.threshold, self.signed, self.most = k, threshold, signed, dict_size
        self.register_buffer("_atoms", torch.zeros(0, input_size))
        self.register_buffer("origins", torch.zeros(0, 2, dtype=torch.int64))

    @property
    def atoms(self) -> Tensor:
        """``[dict_size, input_size]``, rows of norm 1."""
        return self._atoms

    def encode(self, x: Tensor) -> Codes:
        """See `Dictionary.encode`."""
        self.check_input(x)
        if not len(self._atoms):
            raise fail("ITDA.encode", "the dictionary", "be fit first", "no atoms")
        return matching_pursuit(x.to(self._atoms.dtype), self._atoms, self.k, signed=self.signed)

    @torch.no_grad()
    def fit(  # type: ignore[override]
        self,
        activations: Any,
        *,
        origins: Tensor | None = None,
        batch_size: int = 1024,
        num_tokens: int | None = None,
    ) -> int:
        """Go through activations once, in their order, and admit those that are not explained.

        Args:
            activations: ``[n, input_size]`` or a source; finite, not 0.
            origins: ``[n, 2]`` int64, prompt and token of each row; row numbers if not given.
            batch_size: activations that are coded at a time.
            num_tokens: activations that are seen; all of a tensor if not given, and to be given for a source.

        Returns:
            Atoms that there are.

        Raises:
            InputError: if a shape or a number does not fit, or an activation is not finite.
        """
        check_int("ITDA.fit", "batch_size", batch_size)
        if isinstance(activations, Tensor):
            check_floating("ITDA.fit", "activations", activations)
            check_shape("ITDA.fit", "activations", activations, None, self.input_size)
            total = len(activations) if num_tokens is None else num_tokens
            check_int("ITDA.fit", "num_tokens", total, 1, len(activations))
            if not bool(activations[:total].isfinite().all()):
                raise fail("ITDA.fit", "activations", "be finite", "NaN or infinity")
        else:
            total = num_tokens or 0
            check_int("ITDA.fit", "num_tokens", total)
        if origins is not None:
            check_shape("ITDA.fit", "origins", origins, None, 2)
            check_int("ITDA.fit", "the number of origins", len(origins), total)
        at = 0
        for rows in self._batches(activations, batch_size, total):
            if not bool(rows.isfinite().all()):
                raise fail("ITDA.fit", "activations", "be finite", f"NaN or infinity after row {at}")
            numbers = torch.arange(at, at + len(rows))
            where = torch.stack([torch.zeros_like(numbers), numbers], 1) if origins is None else origins[numbers]
            self._admit(rows.float(), where)
            at += len(rows)
            if len(self._atoms) >= self.most:
                break
        self.dict_size = max(1, len(self._atoms))
        return len(self._atoms)

    def _batches(self, activations: Any, batch_size: int, total: int) -> Iterator[Tensor]:
        if isinstance(activations, Tensor):
            yield from torch.split(activations[:total], batch_size)
            return
        batches = as_source(activations).batches(batch_size)
        for start in range(0, total, batch_size):
            yield next(batches)[: total - start]

    def _admit(self, rows: Tensor, origins: Tensor) -> None:
        rows = rows[used := rows.norm(dim=1) > 0]
        origins, rows = origins[used], F.normalize(rows, dim=1)
        errors = self._errors(rows)
        if not len(self._atoms) and len(rows):
            self._add(rows[:1], origins[:1])
            errors = self._errors(rows)
        while len(self._atoms) < self.most and bool((wrong := errors > self.threshold).any()):
            rows, origins, errors = rows[wrong], origins[wrong], errors[wrong]
            # Those that none before them resembles are admitted together; the rest is coded again.
            resembles = (rows @ rows.T).square().tril_(-1)
            fresh = resembles.amax(1) < 1 - self.threshold
            room = self.most - len(self._atoms)
            self._add(rows[fresh][:room], origins[fresh][:room])
            rows, origins = rows[~fresh], origins[~fresh]
            if not len(rows):
                break
            errors = self._errors(rows)

    def _errors(self, rows: Tensor) -> Tensor:
        """Squared error of rows of norm 1."""
        if not len(self._atoms):
            return torch.ones(len(rows))
        codes = matching_pursuit(rows, self._atoms, self.k, signed=self.signed)
        return 1 - codes.values.square().sum(1)

    def _add(self, rows: Tensor, origins: Tensor) -> None:
        self._atoms = torch.cat([self._atoms, rows])
        self.origins = torch.cat([self.origins, origins.to(self.origins)])

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See `Dictionary.make_room`: as many atoms as were found."""
        count = shapes.get("_atoms", (0,))[0]
        self._atoms, self.origins = self._atoms.new_zeros(count, self.input_size), self.origins.new_zeros(count, 2)
        self.dict_size = max(1, count)

    def settings(self) -> dict[str, Any]:
        """See `Dictionary.settings`."""
        return {
            "input_size": self.input_size,
            "dict_size": self.most,
            "k": self.k,
            "threshold": self.threshold,
            "signed": self.signed,
        }


def origin_similarity(one: ITDA, other: ITDA) -> float:
    """Jaccard index of the origins of two dictionaries: how alike two models (or layers) are on the same text.

    Raises:
        InputError: if one of them has no atoms.
    """
    for dictionary in (one, other):
        if not len(dictionary.origins):
            raise fail("origin_similarity", "dictionaries", "be fit", "one without atoms")
    first, second = ({tuple(row) for row in each.origins.tolist()} for each in (one, other))
    return len(first & second) / len(first | second)
