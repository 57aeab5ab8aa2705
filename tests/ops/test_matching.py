"""Matches of atoms: against every permutation, and their symmetries."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from paucity.checks import InputError
from paucity.ops.matching import matched_cosines


@pytest.mark.parametrize("signed", [False, True])
def test_no_permutation_is_better(signed):
    one, other = torch.randn(5, 4), torch.randn(5, 4)
    cosine = F.normalize(one.double(), dim=1) @ F.normalize(other.double(), dim=1).T
    cosine = cosine if signed else cosine.abs()
    best = max(cosine[range(5), list(order)].sum() for order in itertools.permutations(range(5)))
    torch.testing.assert_close(matched_cosines(one, other, signed=signed).sum(), best)


def test_symmetries():
    one = torch.randn(7, 16)
    shuffled = -3 * one[torch.randperm(7)]
    torch.testing.assert_close(matched_cosines(one, shuffled), torch.ones(7, dtype=torch.float64))
    assert matched_cosines(one, shuffled, signed=True).mean() < 0.9
    assert matched_cosines(one, torch.randn(30, 16)).shape == (7,)
    with pytest.raises(InputError, match=r"other must have shape \[any, 16\]"):
        matched_cosines(one, torch.randn(7, 3))
