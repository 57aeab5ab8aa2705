"""The sweep over columns: native against the reference, at odd sizes; SparseGPT's tests compare it with the paper."""

import pytest
import torch

from paucity.checks import InputError
from paucity.kernels.sweep import column_sweep


def problem(cols, rows):
    factor = (torch.randn(cols, cols) / cols**0.5).triu(1) + torch.diag(torch.rand(cols) + 0.5)
    return torch.randn(cols, rows), factor


@pytest.mark.parametrize(("cols", "rows"), [(1, 1), (16, 7), (33, 100), (128, 48), (5, 0)])
@pytest.mark.parametrize("wide", [False, True])
def test_native_matches_reference(monkeypatch, cols, rows, wide):
    weight, factor = problem(cols, rows)
    if wide:  # a block of a larger factor
        factor = torch.full((cols, cols + 9), torch.nan).index_copy(1, torch.arange(cols) + 4, factor)[:, 4 : 4 + cols]
    mask = torch.rand(cols, rows) < 0.5
    found = column_sweep(weight, factor, mask)
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    for one, other in zip(found, column_sweep(weight, factor, mask), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], mask)
    assert (found[0][~mask] == 0).all()


@pytest.mark.parametrize(("n", "m", "cols", "rows"), [(2, 4, 64, 33), (1, 3, 9, 5), (4, 8, 16, 100), (5, 32, 64, 17)])
def test_groups_match_reference(monkeypatch, n, m, cols, rows):
    weight, factor = problem(cols, rows)
    weight[: m // 2] = 1.0  # ties
    found = column_sweep(weight, factor, n=n, m=m)
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    expected = column_sweep(weight, factor, n=n, m=m)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert (found[1].unflatten(0, (-1, m)).sum(1) == n).all()


def test_groups_stay_within_a_mask(monkeypatch):
    weight, factor = problem(64, 33)
    live = torch.rand(64, 33) < 0.6
    found = column_sweep(weight * live, factor, live, n=2, m=4)
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    expected = column_sweep(weight * live, factor, live, n=2, m=4)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1].unflatten(0, (-1, 4)).sum(1), live.unflatten(0, (-1, 4)).sum(1).clamp(max=2))
    assert not (found[1] & ~live).any()


def test_bad_input():
    weight, factor = problem(8, 4)
    with pytest.raises(InputError, match="mask or n and m must be given, got neither"):
        column_sweep(weight, factor)
    with pytest.raises(InputError, match="m must divide the inputs of weight"):
        column_sweep(weight, factor, n=2, m=3)
    with pytest.raises(InputError, match=r"factor must have shape \[8, 8\]"):
        column_sweep(weight, factor[:4, :4], n=2, m=4)
    with pytest.raises(InputError, match="factor must have dtype"):
        column_sweep(weight, factor.double(), n=2, m=4)
