"""TEAL, WINA and CATS: thresholds, scores and masks."""

import pytest
import torch

from paucity.activations import (
    cats_mask,
    cats_threshold,
    column_norm,
    teal_mask,
    teal_threshold,
    wina_mask,
    wina_score,
)
from paucity.checks import InputError


@pytest.mark.parametrize(("threshold_of", "mask_of"), [(teal_threshold, teal_mask), (cats_threshold, cats_mask)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95])
def test_threshold_drops_exactly_the_share(threshold_of, mask_of, sparsity):
    samples = torch.randn(7, 11, 13)
    mask = mask_of(samples, threshold_of(samples, sparsity=sparsity))
    dropped = round(samples.numel() * sparsity)
    lowest = sorted(abs(value) for value in samples.flatten().tolist())[:dropped]
    assert (~mask).sum() == dropped
    assert sorted(samples[~mask].abs().tolist()) == lowest


def test_threshold_scales_and_ignores_order_and_sign():
    samples = torch.randn(500)
    threshold = teal_threshold(samples, sparsity=0.4)
    assert teal_threshold(-4 * samples, sparsity=0.4) == 4 * threshold
    assert teal_threshold(samples[torch.randperm(500)], sparsity=0.4) == threshold


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (1, 4, 32)])
def test_wina_matches_naive(shape):
    x, weight = torch.randn(shape), torch.randn(5, shape[-1])
    mask = wina_mask(x, column_norm(weight), sparsity=0.5)
    num_kept = shape[-1] - round(shape[-1] * 0.5)
    for b in range(shape[0]):
        for t in range(shape[1]):
            norms = [sum(weight[i, j].item() ** 2 for i in range(5)) ** 0.5 for j in range(shape[-1])]
            score = [abs(x[b, t, j].item()) * norms[j] for j in range(shape[-1])]
            best = sorted(range(shape[-1]), key=lambda j: -score[j])[:num_kept]
            assert sorted(mask[b, t].nonzero().flatten().tolist()) == sorted(best)


def test_wina_properties():
    x, weight, perm = torch.randn(3, 40), torch.randn(6, 40), torch.randperm(40)
    norm = column_norm(weight)
    mask = wina_mask(x, norm, sparsity=0.7)
    assert (mask.sum(-1) == 12).all()
    assert torch.equal(mask, wina_mask(-2 * x, 3 * norm, sparsity=0.7))
    assert torch.equal(mask[:, perm], wina_mask(x[:, perm], norm[perm], sparsity=0.7))


def test_wina_error_is_least_for_orthogonal_columns():
    """The theorem: with orthogonal columns no mask of the same size has a smaller output error."""
    weight = torch.linalg.qr(torch.randn(8, 8)).Q * torch.rand(8)
    x = torch.randn(8)
    error = lambda mask: (weight @ (x * ~mask)).norm()  # noqa: E731
    ours = error(wina_mask(x, column_norm(weight), sparsity=0.5))
    for kept in torch.combinations(torch.arange(8), 4):
        mask = torch.zeros(8, dtype=torch.bool).index_fill(0, kept, True)
        assert ours <= error(mask) * (1 + 1e-5)


def test_bad_input():
    with pytest.raises(InputError, match="samples must be finite"):
        teal_threshold(torch.tensor([1.0, float("nan")]), sparsity=0.5)
    with pytest.raises(InputError, match="samples must hold at least one entry"):
        teal_threshold(torch.empty(0, 4), sparsity=0.5)
    with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\), got 1"):
        cats_threshold(torch.ones(3), sparsity=1.0)
    with pytest.raises(InputError, match=r"weight_norm must have shape \[4\], got \[3\]"):
        wina_score(torch.ones(2, 4), torch.ones(3))
