"""SparseGPT against the paper by loops: one optimal brain surgeon step a column, with explicit inverses."""

import pytest
import torch
from torch import nn

from paucity.checks import InputError
from paucity.weights import prune
from paucity.weights.pruner import Layer
from paucity.weights.sparsegpt import SparseGPT, sparsegpt_sweep
from paucity.weights.statistics import InputGram, inverse_factor


def problem(rows, cols, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5
    inputs = torch.randn(tokens, cols, generator=generator) @ (mix + torch.eye(cols))
    return torch.randn(rows, cols, generator=generator), inputs


def naive(weight, inputs, sparsity, block, n=None, m=None, damping=0.01):
    """Algorithm 1 without any factor: the inverse of what is left of the Hessian, made anew for every column."""
    weight, gram = weight.double().clone(), (inputs.T @ inputs).double()
    gram += damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    mask = torch.ones_like(weight, dtype=torch.bool)
    inverse_at = [torch.linalg.inv(gram[j:, j:])[0] for j in range(len(gram))]
    for j in range(weight.shape[1]):
        if m is None and j % block == 0:
            scores = torch.stack([weight[:, c] ** 2 / inverse_at[c][0] for c in range(j, min(j + block, len(gram)))], 1)
            removed = scores.flatten().argsort()[: round(sparsity * scores.numel())]
            chosen = torch.ones(scores.numel(), dtype=torch.bool).index_fill(0, removed, False)
            mask[:, j : j + block] = chosen.view(scores.shape)
        if m is not None and j % m == 0:
            scores = torch.stack([weight[:, c] ** 2 / inverse_at[c][0] for c in range(j, j + m)], 1)
            mask[:, j : j + m] = torch.zeros_like(scores).scatter(1, scores.topk(n).indices, 1).bool()
        removed = torch.where(mask[:, j], 0, weight[:, j])
        weight[:, j:] -= removed[:, None] / inverse_at[j][0] * inverse_at[j][None]
        weight[~mask[:, j], j] = 0
    return weight.float(), mask


@pytest.mark.parametrize(("rows", "cols", "block"), [(5, 12, 128), (7, 40, 16), (3, 33, 8), (4, 1, 128)])
def test_unstructured_matches_naive(rows, cols, block):
    weight, inputs = problem(rows, cols)
    gram = InputGram(cols)
    gram.add(inputs)
    layer = Layer(weight.clone(), "w", gram)
    mask = SparseGPT(sparsity=0.6, block_size=block).solve(layer, 0.6)
    expected, expected_mask = naive(weight, inputs, 0.6, block)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(layer.weight, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("n", "m", "cols"), [(2, 4, 40), (1, 3, 33), (4, 8, 24), (5, 32, 64)])
def test_groups_match_naive(n, m, cols):
    weight, inputs = problem(6, cols)
    gram = InputGram(cols)
    gram.add(inputs)
    layer = Layer(weight.clone(), "w", gram)
    mask = SparseGPT(n=n, m=m, block_size=16).solve(layer, 1 - n / m)
    expected, expected_mask = naive(weight, inputs, None, None, n, m)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(layer.weight, expected, rtol=1e-3, atol=1e-3)


def test_what_stays_makes_up_for_the_error():
    weight, inputs = problem(16, 64, tokens=500)
    inputs += 3 * inputs[:, :8].repeat(1, 8)  # inputs that say much of each other
    pruned, mask = sparsegpt_sweep(weight, inputs.T @ inputs, sparsity=0.5)
    assert (pruned[~mask] == 0).all()
    error = (inputs @ (pruned - weight).T).square().sum()
    only_masked = (inputs @ (weight * mask - weight).T).square().sum()
    assert error < 0.7 * only_masked
    same, everything = sparsegpt_sweep(weight, inputs.T @ inputs, sparsity=0.0)
    assert everything.all()
    torch.testing.assert_close(same, weight)


def test_blocks_stay_or_go_as_one():
    weight, inputs = problem(8, 64)
    gram = InputGram(64)
    gram.add(inputs)
    layer = Layer(weight.clone(), "w", gram)
    mask = SparseGPT(sparsity=0.5, block=(2, 4)).solve(layer, 0.5)
    tiles = mask.view(4, 2, 16, 4)
    assert (tiles.any(1, keepdim=True).any(3, keepdim=True) == tiles).all()
    assert mask.sum() == 256


def test_factor_of_the_inverse():
    _, inputs = problem(1, 23)
    gram = InputGram(23)
    for batch in inputs.split(61):
        gram.add(batch)
    torch.testing.assert_close(gram.whole, inputs.T @ inputs, rtol=1e-4, atol=1e-3)
    factor, damping = gram.inverse_factor(0.01)
    damped = inputs.T @ inputs
    damped += 0.01 * damped.diagonal().mean() * torch.eye(23)
    assert damping == 0.01
    assert (factor.tril(-1) == 0).all()
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(23), rtol=1e-3, atol=1e-3)


def test_singular_and_dead_inputs_are_damped_and_said():
    weight, inputs = problem(4, 32, tokens=5)
    inputs[:, 3] = 0
    gram = InputGram(32)
    gram.add(inputs)
    layer = Layer(weight.clone(), "w", gram)
    mask = SparseGPT(sparsity=0.5).solve(layer, 0.5)
    assert layer.weight.isfinite().all()
    assert mask.sum() == 64
    assert (layer.weight[:, 3] == 0).all()
    assert "5 calibration tokens for 32 inputs" in layer.notes[0]
    indefinite = torch.tensor([[1.0, 1.4], [1.4, 1.0]])  # rounding can make a Gram matrix so
    _, damping = inverse_factor(indefinite, 0.01)
    assert damping == 1.0
    with pytest.raises(InputError, match="gram must be positive semidefinite"):
        inverse_factor(torch.tensor([[-1.0, 0.0], [0.0, -1.0]]), 0.01)
    with pytest.raises(InputError, match=r"gram must have shape \[32, 32\], got \[31, 31\]"):
        sparsegpt_sweep(weight, torch.eye(31), sparsity=0.5)


def test_zeros_of_a_sparse_model_make_room_for_no_live_weight():
    """Half of it zero, then 2:4: where a group has two live weights they stay, and only live ones do."""
    layer = nn.Linear(32, 24, bias=False)
    layer.weight.data.mul_(torch.rand(24, 32) < 0.5)
    live, model, inputs = layer.weight != 0, nn.Sequential(layer), torch.randn(200, 32)
    expected = live.unflatten(1, (-1, 4)).sum(-1).clamp(max=2)
    mask = prune(model, "sparsegpt", n=2, m=4, calibration=[inputs])["0.weight"]
    assert torch.equal(mask.unflatten(1, (-1, 4)).sum(-1), expected)
    assert not (mask & ~live).any()
    dense = nn.Linear(32, 24, bias=False)
    dense.weight.data.mul_(torch.rand(24, 32) < 0.3)
    zeros = (dense.weight == 0).sum()
    prune(nn.Sequential(dense), "sparsegpt", sparsity=0.5, calibration=[inputs])
    assert (dense.weight == 0).sum() == zeros  # sparser than asked for already
