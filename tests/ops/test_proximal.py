"""Proximal codes: each shrink minimises what it claims, ISTA is scikit-learn's lasso, FISTA gets there sooner."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch.nn import functional as F

from paucity.checks import InputError
from paucity.ops.proximal import cel0_threshold, hard_threshold, proximal_codes, soft_threshold

PENALTY = 0.7


def cel0(a, penalty):
    bend = (2 * penalty) ** 0.5
    return penalty - 0.5 * (a.abs() - bend).square() * (a.abs() <= bend)


PENALTIES = {
    soft_threshold: lambda a: PENALTY * a.abs(),
    hard_threshold: lambda a: PENALTY * (a != 0),
    cel0_threshold: lambda a: cel0(a, PENALTY),
}


@pytest.mark.parametrize("step", [0.3, 0.9])
@pytest.mark.parametrize("shrink", PENALTIES, ids=lambda f: f.__name__)
def test_a_shrink_is_the_prox_of_its_penalty(shrink, step):
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    for u in (-3.0, -1.3, -0.4, 0.0, 0.2, 0.61, 0.97, 1.1, 1.9, 3.3):
        cost = (grid - u).square() / 2 + step * PENALTIES[shrink](grid)
        best = shrink(torch.tensor(u, dtype=torch.float64), PENALTY, step)
        own = (best - u).square() / 2 + step * PENALTIES[shrink](best)
        assert own <= cost.min() + 1e-9, (u, best)


def test_cel0_is_hard_where_the_step_is_long():
    u = torch.linspace(-3, 3, 61)
    assert torch.equal(cel0_threshold(u, 0.5, 1.0), hard_threshold(u, 0.5, 1.0))


def draw(n=12, m=20, d=10):
    generator = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(m, d, generator=generator, dtype=torch.float64), dim=1)
    return torch.randn(n, d, generator=generator, dtype=torch.float64), atoms


@pytest.mark.parametrize("nonnegative", [False, True])
def test_soft_codes_are_the_lasso(nonnegative):
    x, atoms = draw()
    lasso = Lasso(alpha=0.3 / 10, fit_intercept=False, tol=1e-10, max_iter=100_000, positive=nonnegative)
    theirs = lasso.fit(atoms.T.numpy(), x.T.numpy()).coef_
    for accelerate, steps in ((False, 20_000), (True, 3_000)):
        codes = proximal_codes(
            x, atoms, 0.3, accelerate=accelerate, num_steps=steps, tolerance=1e-9, nonnegative=nonnegative
        )
        np.testing.assert_allclose(codes.to_dense().numpy(), theirs, atol=1e-3)
        assert nonnegative or (codes.values < 0).any()


def objective(x, atoms, codes, penalty):
    error = (x - codes.decode(atoms)).square().sum() / 2
    return error + penalty(codes.to_dense()).sum()


def test_fista_is_ahead_of_ista():
    x, atoms = draw(m=60)
    cost = [
        objective(x, atoms, proximal_codes(x, atoms, 0.05, accelerate=fast, num_steps=40), lambda a: 0.05 * a.abs())
        for fast in (False, True)
    ]
    assert cost[1] < cost[0]


@pytest.mark.parametrize("shrink", ["soft", "hard", "cel0"])
def test_every_step_descends(shrink):
    x, atoms = draw()
    penalty = {"soft": lambda a: 0.2 * a.abs(), "hard": lambda a: 0.2 * (a != 0), "cel0": lambda a: cel0(a, 0.2)}
    start = (x @ atoms.T) * 0.5
    costs = [
        objective(x, atoms, proximal_codes(x, atoms, 0.2, shrink=shrink, num_steps=n, start=start), penalty[shrink])
        for n in range(1, 12)
    ]
    assert all(after <= before + 1e-9 for before, after in pairwise(costs))


def test_bad_input():
    x, atoms = draw()
    with pytest.raises(InputError, match="accelerate must be False for a penalty that is not convex, got True with"):
        proximal_codes(x, atoms, 0.1, shrink="hard", accelerate=True)
    with pytest.raises(InputError, match=r"shrink must be one of cel0, hard, soft, got sofd \(did you mean 'soft'\?\)"):
        proximal_codes(x, atoms, 0.1, shrink="sofd")
    with pytest.raises(InputError, match=r"penalty must be in \[0, inf\)"):
        proximal_codes(x, atoms, -0.1)
    with pytest.raises(InputError, match=r"x must hold at least one row"):
        proximal_codes(x[:0], atoms, 0.1)
