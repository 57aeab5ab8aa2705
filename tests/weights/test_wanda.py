"""Wanda: |W_ij| * ||x_j||, compared within a row."""

import pytest
import torch

from paucity.checks import InputError
from paucity.weights.wanda import wanda_mask, wanda_score


def naive(weight, norm):
    rows, cols = weight.shape
    return torch.tensor([[abs(weight[i, j].item()) * norm[j].item() for j in range(cols)] for i in range(rows)])


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 64)])
def test_matches_naive(shape):
    weight, norm = torch.randn(shape), torch.rand(shape[1])
    torch.testing.assert_close(wanda_score(weight, norm), naive(weight, norm))


def test_experts_are_scored_one_by_one():
    weight, norm = torch.randn(3, 5, 8), torch.rand(3, 8)
    expected = torch.stack([naive(w, n) for w, n in zip(weight, norm, strict=True)])
    torch.testing.assert_close(wanda_score(weight, norm), expected)
    assert (wanda_mask(weight, norm, sparsity=0.5).sum(-1) == 4).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_properties(sparsity):
    w, n, perm = torch.randn(8, 40), torch.rand(40), torch.randperm(40)
    mask = wanda_mask(w, n, sparsity=sparsity)
    assert (mask.sum(-1) == 40 - round(40 * sparsity)).all()
    assert torch.equal(mask, wanda_mask(-2 * w, 4 * n, sparsity=sparsity))
    assert torch.equal(mask[:, perm], wanda_mask(w[:, perm], n[perm], sparsity=sparsity))


def test_bad_input():
    with pytest.raises(InputError, match=r"input_norm must have shape \[4\], got \[3\]"):
        wanda_score(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(InputError, match=r"input_norm must have shape \[2, 4\], got \[4\]"):
        wanda_score(torch.ones(2, 3, 4), torch.ones(4))
    with pytest.raises(InputError, match="weight must have 2 or 3 dimensions"):
        wanda_score(torch.ones(4), torch.ones(4))
