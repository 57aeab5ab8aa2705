"""Magnitude: the largest weights of a layer stay."""

import pytest
import torch

from paucity.checks import InputError
from paucity.weights.magnitude import magnitude_mask, magnitude_score


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 64)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_matches_naive(shape, sparsity):
    weight = torch.randn(shape)
    order = sorted((-abs(weight[i, j].item()), i, j) for i in range(shape[0]) for j in range(shape[1]))
    expected = torch.zeros(shape, dtype=torch.bool)
    for _, i, j in order[: weight.numel() - round(weight.numel() * sparsity)]:
        expected[i, j] = True
    assert torch.equal(magnitude_mask(weight, sparsity=sparsity), expected)


def test_properties():
    weight, rows = torch.randn(8, 40), torch.randperm(8)
    mask = magnitude_mask(weight, sparsity=0.75)
    assert torch.equal(mask, magnitude_mask(-3 * weight, sparsity=0.75))
    assert torch.equal(mask[rows], magnitude_mask(weight[rows], sparsity=0.75))
    assert magnitude_score(weight.bfloat16()).dtype == torch.float32
    assert not magnitude_score(weight.requires_grad_()).requires_grad


def test_bad_input():
    with pytest.raises(InputError, match="weight must be floating point"):
        magnitude_score(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\), got 1"):
        magnitude_mask(torch.ones(2, 2), sparsity=1.0)
