"""Orthogonal matching pursuit against least squares and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp
from torch.nn import functional as F

from paucity.checks import InputError, InputTypeError
from paucity.ops.pursuit import orthogonal_matching_pursuit


def draw(n, m, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(m, d, generator=generator, dtype=torch.float64), dim=1)
    return torch.randn(n, d, generator=generator, dtype=torch.float64), atoms


@pytest.mark.parametrize(("n", "m", "d", "k"), [(1, 4, 3, 1), (7, 20, 9, 4), (30, 64, 16, 8), (5, 8, 8, 8)])
def test_matches_scikit_learn(n, m, d, k):
    x, atoms = draw(n, m, d)
    theirs = orthogonal_mp(atoms.T.numpy(), x.T.numpy(), n_nonzero_coefs=k).reshape(m, n)
    ours = orthogonal_matching_pursuit(x, atoms, k).to_dense().numpy()
    np.testing.assert_allclose(ours, theirs.T, atol=1e-9)


def test_values_are_least_squares_on_the_support():
    x, atoms = draw(12, 40, 10, seed=1)
    codes = orthogonal_matching_pursuit(x, atoms, 4)
    for row in range(12):
        chosen = atoms[codes.indices[row].long()]
        solved = torch.linalg.lstsq(chosen.T, x[row].unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(codes.values[row], solved)
        assert len(set(codes.indices[row].tolist())) == 4


def test_stops_at_the_tolerance_and_at_what_is_exact():
    x, atoms = draw(20, 30, 12, seed=2)
    loose = orthogonal_matching_pursuit(x, atoms, 12, tolerance=1.5)
    assert ((x - loose.decode(atoms)).norm(dim=1) <= 1.5).all()
    assert (loose.l0() < 12).all()
    exact = orthogonal_matching_pursuit(3.0 * atoms[:5], atoms, 4)
    assert torch.equal(exact.l0(), torch.ones(5, dtype=torch.int64))
    torch.testing.assert_close(exact.decode(atoms), 3.0 * atoms[:5])


def test_leading_sizes_and_float32():
    x, atoms = draw(6, 10, 5)
    codes = orthogonal_matching_pursuit(x.float().view(2, 3, 5), atoms.float(), 3)
    assert codes.values.shape == (2, 3, 3)
    assert codes.values.dtype == torch.float32
    assert (codes.values < 0).any()


def test_bad_input():
    x, atoms = draw(4, 6, 5)
    with pytest.raises(InputError, match=r"k must be in \[1, 5\], got 6"):
        orthogonal_matching_pursuit(x, atoms, 6)
    with pytest.raises(InputError, match=r"atoms must have norm 1"):
        orthogonal_matching_pursuit(x, 3 * atoms, 2)
    with pytest.raises(InputTypeError, match=r"x must be floating point"):
        orthogonal_matching_pursuit(x.long(), atoms, 2)
