import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paucity.checks import InputError
from paucity.ops.relax import gumbel_topk, smooth_step, sr_ste, ste
from paucity.ops.select import nm_mask


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("decay", [None, 0.0, 2e-4, 0.5])
def test_straight_through_matches_the_closed_form(decay):
    weight = torch.randn(6, 8, generator=seeded(), dtype=torch.float64).requires_grad_()
    mask = nm_mask(weight.abs(), n=2, m=4)
    grad = torch.randn(6, 8, generator=seeded(1), dtype=torch.float64)
    out = ste(weight, mask) if decay is None else sr_ste(weight, mask, decay=decay)
    assert torch.equal(out, weight.detach() * mask)
    out.backward(grad)
    for i, j in torch.cartesian_prod(torch.arange(6), torch.arange(8)).tolist():
        removed = 0.0 if mask[i, j] else weight[i, j].item()
        assert weight.grad[i, j].item() == pytest.approx(grad[i, j].item() + (decay or 0.0) * removed)


def test_removed_entries_may_be_nan():
    weight = torch.tensor([1.0, math.nan, math.inf], requires_grad=True)
    out = ste(weight, torch.tensor([True, False, False]))
    out.sum().backward()
    assert out.tolist() == [1.0, 0.0, 0.0]
    assert weight.grad.tolist() == [1.0, 1.0, 1.0]


def test_straight_through_under_vmap():
    weight, mask = torch.randn(3, 4, generator=seeded()), torch.tensor([True, False, True, False])
    grad = torch.func.vmap(torch.func.grad(lambda w: sr_ste(w, mask, decay=0.5).sum()))(weight)
    assert torch.allclose(grad, 1 + 0.5 * weight * ~mask)


def naive_gumbel_topk(keys, k, temperature):
    """Algorithm of Xie & Ermon in Python floats, one row."""
    total = [0.0] * len(keys)
    for _ in range(k):
        exps = [math.exp((key - max(keys)) / temperature) for key in keys]
        prob = [e / sum(exps) for e in exps]
        total = [t + p for t, p in zip(total, prob, strict=True)]
        keys = [key + math.log1p(-p) if p < 1 else -math.inf for key, p in zip(keys, prob, strict=True)]
    return total


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (2, 0.7), (3, 2.0), (5, 1.0)])
@pytest.mark.parametrize("dim", [0, 1])
def test_gumbel_matches_naive(k, temperature, dim):
    logits = torch.randn(5, 5, generator=seeded(), dtype=torch.float64)
    noise = -torch.empty_like(logits).exponential_(generator=seeded(7)).log()
    rows = (logits + noise).movedim(dim, -1).tolist()
    expect = torch.tensor([naive_gumbel_topk(row, k, temperature) for row in rows], dtype=torch.float64)
    got = gumbel_topk(logits, k=k, temperature=temperature, dim=dim, generator=seeded(7))
    assert torch.allclose(got.movedim(dim, -1), expect, atol=1e-9)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(1, 6), st.sampled_from([0.01, 0.5, 1.0, 3.0]), st.sampled_from([1.0, 1000.0]), st.integers(0, 99))
def test_gumbel_is_a_relaxed_subset(k, temperature, scale, seed):
    logits = (torch.randn(4, 6, generator=seeded(seed)) * scale).requires_grad_()
    soft = gumbel_topk(logits, k=k, temperature=temperature, generator=seeded(seed))
    assert torch.allclose(soft.sum(-1), torch.full((4,), float(k)), atol=1e-4)
    assert soft.min() >= 0
    hard = gumbel_topk(logits, k=k, temperature=temperature, hard=True, generator=seeded(seed))
    assert ((hard == 0) | (hard == 1)).all()
    assert (hard.sum(-1) == k).all()
    weight = torch.randn(4, 6, generator=seeded(1))
    (grad_soft,) = torch.autograd.grad((soft * weight).sum(), logits)
    (grad_hard,) = torch.autograd.grad((hard * weight).sum(), logits)
    assert grad_soft.isfinite().all()
    assert torch.equal(grad_soft, grad_hard)


def test_gumbel_draws_in_proportion():
    prob = torch.tensor([0.5, 0.3, 0.2, 0.0])
    hard = gumbel_topk(prob.log().expand(20_000, 4), hard=True, generator=seeded())
    assert torch.allclose(hard.mean(0), prob, atol=4 * math.sqrt(0.25 / 20_000))
    pair = gumbel_topk(prob.log().expand(20_000, 4), k=2, hard=True, generator=seeded())
    first_two = 0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7
    assert (pair[:, 0] * pair[:, 1]).mean().item() == pytest.approx(first_two, abs=4 * math.sqrt(0.25 / 20_000))
    assert gumbel_topk(torch.zeros(2, 4, dtype=torch.bfloat16), generator=seeded()).dtype == torch.bfloat16


@pytest.mark.parametrize("k", [1, 2, 3])
def test_gumbel_gradient(k):
    logits = torch.randn(2, 4, generator=seeded(), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gumbel_topk(x, k=k, temperature=0.8, generator=seeded(3)), logits)


@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0])
def test_smooth_step_matches_the_equation(gamma):
    x = torch.linspace(-gamma, gamma, 41, dtype=torch.float64)
    for got, t in zip(smooth_step(x, gamma=gamma).tolist(), x.tolist(), strict=True):
        cubic = -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5
        assert got == pytest.approx(0 if t <= -gamma / 2 else 1 if t >= gamma / 2 else cubic, abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: smooth_step(x, gamma=gamma), (x / 2.1).requires_grad_(), eps=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ste(torch.ones(2), torch.ones(2)), "ste: mask must be bool, got torch.float32"),
        (lambda: sr_ste(torch.ones(2), torch.ones(3) > 0), r"sr_ste: mask must have shape \[2\], got \[3\]"),
        (lambda: sr_ste(torch.ones(2), torch.ones(2) > 0, decay=-1.0), r"decay must be in \[0, inf\), got -1.0"),
        (lambda: gumbel_topk(torch.ones(3), k=4), r"gumbel_topk: k must be in \[1, 3\], got 4"),
        (lambda: gumbel_topk(torch.ones(3), temperature=0.0), r"temperature must be in \(0, inf\), got 0.0"),
        (lambda: gumbel_topk(torch.tensor([0.0, -math.inf]), k=2), "with at least 2 finite in a row"),
        (lambda: gumbel_topk(torch.tensor([0.0, math.nan])), "logits must be finite or -inf"),
        (lambda: gumbel_topk(torch.tensor(0.0)), "logits must have at least 1 dimension, got a scalar"),
        (lambda: smooth_step(torch.ones(2), gamma=0.0), r"smooth_step: gamma must be in \(0, inf\), got 0.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
