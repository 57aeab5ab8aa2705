"""Errors that are linear, that are not, and norms that are, by construction."""

import numpy as np
import pytest
import torch

from paucity.checks import InputError
from paucity.dictionary.dark_matter import dark_matter, least_squares


def test_a_linear_error_is_all_linear():
    fit, test = torch.randn(400, 6, dtype=torch.float64), torch.randn(300, 6, dtype=torch.float64)
    keep = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.0])
    found = dark_matter(lambda x: x * keep + 0.1, fit, test)
    assert found.r2 == pytest.approx(1)
    assert found.nonlinear == pytest.approx(0, abs=1e-12)
    assert found.linear == pytest.approx(found.fvu)
    assert torch.isnan(found.r2_by_dim[:4]).all() or found.r2_by_dim[:4].max() <= 1
    torch.testing.assert_close(found.linear_error(test), test * (1 - keep) - 0.1)
    assert found.norm_r2 < 0.2  # a square is not linear in what is symmetric


def test_noise_is_not_linear():
    fit, test = torch.randn(4000, 6), torch.randn(4000, 6)
    g = torch.Generator().manual_seed(11)
    found = dark_matter(lambda x: x + 0.1 * torch.randn(x.shape, generator=g), fit, test)
    assert abs(found.r2) < 0.01
    assert found.fvu == pytest.approx(0.01, rel=0.1)
    assert found.nonlinear == pytest.approx(found.fvu, rel=0.01)


def test_norms_that_are_linear():
    fit, test = torch.randn(4000, 5), torch.randn(2000, 5)
    g = torch.Generator().manual_seed(11)

    def dictionary(x):
        size = (4 + x[:, :1].clamp(-3, 3)).sqrt()
        return x + size * torch.nn.functional.normalize(torch.randn(x.shape, generator=g), dim=1)

    found = dark_matter(dictionary, fit, test)
    assert found.norm_r2 > 0.98
    torch.testing.assert_close(found.norms(test), (4 + test[:, 0]).clamp_min(0).sqrt(), atol=0.1, rtol=0.1)


def test_figures_are_those_of_loops():
    fit, test = torch.randn(60, 4).double(), torch.randn(50, 4).double()
    found = dark_matter(torch.tanh, fit, test, rows=7)
    x, y = (np.hstack([rows.numpy(), np.ones((len(rows), 1))]) for rows in (fit, test))
    wanted = (test - test.tanh()).numpy()
    missed = deviations = 0.0
    for i in range(4):
        weights = np.linalg.lstsq(x, (fit - fit.tanh()).numpy()[:, i], rcond=None)[0]
        left, away = ((y @ weights - wanted[:, i]) ** 2).sum(), ((wanted[:, i] - wanted[:, i].mean()) ** 2).sum()
        assert found.r2_by_dim[i] == pytest.approx(1 - left / away)
        missed, deviations = missed + left, deviations + away
    assert found.r2 == pytest.approx(1 - missed / deviations)
    assert found.mean_r2 == pytest.approx(sum(found.r2_by_dim.tolist()) / 4)
    assert found.num_tokens == 50


def test_least_squares_of_rows_that_depend_is_the_smallest():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # the columns sum to the intercept
    found = least_squares(x, torch.tensor([[2.0], [4.0], [9.0]]))
    rows = x.double().numpy() - x.double().numpy().mean(0)
    size = np.linalg.norm(rows, axis=0)
    wanted = np.linalg.pinv(rows / size) @ (np.array([[2.0], [4.0], [9.0]]) - 5) / size[:, None]
    torch.testing.assert_close(found[:-1], torch.from_numpy(wanted))
    torch.testing.assert_close(x.double() @ found[:-1] + found[-1], torch.tensor([[3.0], [3.0], [9.0]]).double())


def test_bad_input():
    x = torch.randn(20, 4)
    with pytest.raises(InputError, match="fit must have more than 5 rows, one more than its width, got 5"):
        dark_matter(torch.tanh, x[:5], x)
    with pytest.raises(InputError, match=r"test must have shape \[any, 4\], got \[20, 3\]"):
        dark_matter(torch.tanh, x, x[:, :3])
    with pytest.raises(InputError, match="fit must be finite, got NaN or infinity"):
        dark_matter(torch.tanh, x / 0, x)
    with pytest.raises(InputError, match=r"reconstructions must have shape \[20, 4\], got \[20, 2\]"):
        dark_matter(lambda rows: rows[:, :2], x, x)


@pytest.mark.parametrize("mean", [1.0, 1e4, 1e6])
def test_small_dimensions_beside_a_large_one_are_fit(mean):
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(2000, 9, generator=generator, dtype=torch.float64)
    x[:, 0] = mean * (1 + 0.01 * torch.randn(2000, generator=generator))
    target = x[:, 1:] @ torch.randn(8, 3, generator=generator, dtype=torch.float64)
    weight = least_squares(x, target)
    torch.testing.assert_close(x @ weight[:-1] + weight[-1], target, atol=1e-5, rtol=1e-4)
