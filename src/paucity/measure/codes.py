"""What codes and atoms say of a dictionary without a model: atoms found again, atoms that never or nearly always fire.

``mcc`` (mean correlation coefficient) is the mean absolute cosine of a Hungarian match to true atoms, as in Sharkey et
al. 2022 and most work on synthetic truth; ``stability`` the same between trainings that differ in their seed (Fel et
al. 2025, https://arxiv.org/abs/2502.12892, take signed cosines: ``signed=True``). An atom is dead if no code of a
window of tokens has it with a value other than 0, and dense if more than a tenth of them do (that share is the
choice of Gao et al. 2024's successors and is an argument); both depend on the window, which is always given with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..checks import check_range, fail
from ..ops.formats import Codes
from ..ops.matching import matched_cosines
from .stats import Estimate, mean_interval


def mcc(true: Tensor, found: Tensor, *, signed: bool = False, seed: int = 0) -> Estimate:
    """Mean cosine of the best match of true atoms to found ones, with a bootstrap over the matched pairs.

    Where fewer atoms were found than there are, the others count as found with cosine 0.

    Args:
        true: ``[m, d]``.
        found: ``[n, d]``.
        signed: whether the opposite direction is another atom; otherwise absolute cosines are matched.
        seed: of the bootstrap.
    """
    cosines = matched_cosines(true, found, signed=signed).tolist()
    return mean_interval(cosines + [0.0] * (len(true) - len(cosines)), seed=seed)


def stability(trainings: Sequence[Tensor], *, signed: bool = False, seed: int = 0) -> Estimate:
    """Mean cosine of the best match between the atoms ``[n, d]`` of every two trainings.

    The samples of the bootstrap are the pairs of trainings, so that two trainings leave no interval.

    Raises:
        InputError: if there are fewer than two trainings.
    """
    if len(trainings) < 2:
        raise fail("stability", "trainings", "be at least 2", len(trainings))
    pairs = combinations(trainings, 2)
    return mean_interval([float(matched_cosines(a, b, signed=signed).mean()) for a, b in pairs], seed=seed)


@dataclass(frozen=True, eq=False)
class Firing:
    """How often atoms fire.

    Attributes:
        counts: ``[dict_size]`` int64, codes in which an atom has a value other than 0.
        num_tokens: codes counted, which is the window of what counts as dead.
    """

    counts: Tensor
    num_tokens: int

    @property
    def density(self) -> Tensor:
        """``[dict_size]`` float64, share of the codes that have an atom."""
        return self.counts.double() / self.num_tokens

    @property
    def dead(self) -> float:
        """Share of the atoms in no code of the window."""
        return float((self.counts == 0).double().mean())

    def dense(self, above: float = 0.1) -> float:
        """Share of the atoms in more than ``above`` of the codes."""
        check_range("Firing.dense", "above", above, 0, 1, open_high=True)
        return float((self.density > above).double().mean())


def firing(batches: Sequence[Codes]) -> Firing:
    """How often each atom is in codes ``[..., k]``; one that a code names twice counts once.

    Raises:
        InputError: if there is no code, or the batches differ in ``dict_size``.
    """
    num = sum(codes.values.shape[:-1].numel() for codes in batches)
    if not num:
        raise fail("firing", "batches", "hold at least one code", "none")
    counts = torch.zeros(batches[0].dict_size, dtype=torch.int64)
    for codes in batches:
        if codes.dict_size != len(counts):
            raise fail("firing", "batches", f"all have dict_size {len(counts)}", codes.dict_size)
        row, atom = entries(codes)
        counts += torch.bincount(torch.unique(row * len(counts) + atom) % len(counts), minlength=len(counts))
    return Firing(counts, num)


def entries(codes: Codes) -> tuple[Tensor, Tensor]:
    """The row and the atom of every value other than 0, leading dimensions flattened: int64 on the CPU."""
    rows = codes.values.detach().reshape(-1, codes.k).cpu()
    row, slot = (rows != 0).nonzero(as_tuple=True)
    return row, codes.indices.reshape(-1, codes.k).cpu()[row, slot].long()
