"""Knees of curves."""

import math

import numpy as np
import pytest

from paucity.checks import InputError
from paucity.ops.knee import knee, last_above

X = [i / 20 for i in range(20)]


def broken(turn, before, after):
    return [1 + before * x + (after - before) * max(0.0, x - turn) for x in X]


@pytest.mark.parametrize("turn", [0.2, 0.41, 0.63])
@pytest.mark.parametrize(("before", "after"), [(0.0, -2.0), (-0.1, -1.0), (0.2, -3.0)])
def test_a_broken_line_is_found_again(turn, before, after):
    found = knee(X, broken(turn, before, after))
    assert found.x == pytest.approx(turn, abs=0.002)
    assert (found.slope_before, found.slope_after) == pytest.approx((before, after), abs=0.02)
    assert found.y == pytest.approx(1 + before * turn, abs=0.005)
    assert found.ratio == pytest.approx(after / before, rel=0.1) if before < 0 else found.ratio > 100


def naive(xs, ys):
    """The best of many broken lines by normal equations, written out."""
    best = None
    for turn in np.linspace(xs[1], xs[-2], 1201):
        rows = np.array([[1.0, x, max(0.0, x - turn)] for x in xs])
        fit = np.linalg.solve(rows.T @ rows, rows.T @ np.array(ys))
        error = sum((row @ fit - y) ** 2 for row, y in zip(rows, ys, strict=True))
        if best is None or error < best[0]:
            best = error, turn
    return best[1]


@pytest.mark.parametrize("seed", range(4))
def test_noise_moves_it_as_least_squares_says(seed):
    ys = [y + e for y, e in zip(broken(0.5, -0.1, -1.5), np.random.default_rng(seed).normal(0, 0.02, 20), strict=True)]
    found = knee(X, ys)
    assert found.x == pytest.approx(naive(X, ys), abs=0.003)
    assert found.x == pytest.approx(0.5, abs=0.1)
    assert found.residual < found.straight_residual


def test_a_parabola_has_a_ratio_of_three_and_scales_do_not_matter():
    dense = np.linspace(0, 1, 400)
    assert knee(dense, 1 - dense**2).ratio == pytest.approx(3, abs=0.1)
    ys = [1 - x**4 for x in X]
    one, other = knee(X, ys), knee([100 * x for x in X], [7 * y + 3 for y in ys])
    assert (other.x, other.ratio) == pytest.approx((100 * one.x, one.ratio), rel=1e-3)


def test_a_smooth_curve_is_not_sharp():
    assert knee(X, broken(0.41, -0.1, -1.0)).is_sharp
    for power in (2, 3, 4):
        found = knee(X, [1 - 2 * x**power for x in X])
        assert found.smooth_residual < 1e-9 < found.residual
        assert not found.is_sharp


def test_where_there_is_no_knee():
    assert knee(X, [1 - x for x in X]) is None  # straight
    assert knee(X, [math.exp(-5 * x) for x in X]) is None  # falls fastest at first
    assert knee(X, [1 + x**2 for x in X]) is None  # rises
    assert knee(X[:4], [1, 1, 0.9, 0]) is None  # four points lie on many broken lines


def test_until_leaves_the_lower_turn_of_a_sigmoid_out():
    ys = [1 / (1 + math.exp(30 * (x - 0.5))) for x in X]
    found = knee(X, ys, until=0.5)
    assert found.num_points == 11
    assert 0.35 < found.x < 0.45


def test_last_above():
    assert last_above(X, broken(0.5, 0.0, -1.0), level=0.9) == pytest.approx(0.6)
    assert last_above(X, [1.0] * 20, level=0.9) == 0.95
    assert last_above(X, [0.5] * 20, level=0.9) is None
    assert last_above([0, 1, 2, 3], [1, 0, 1, 0], level=0.5) == 0.5  # the first time counts


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([0, 1], [1], "knee: y must have 2 values, got 1"),
        ([], [], "x must hold at least one value"),
        ([0, 1, 1], [1, 1, 1], "x must rise from value to value"),
        ([0, 1, 2], [1, math.nan, 1], "y must hold finite numbers"),
    ],
)
def test_bad_input(x, y, message):
    with pytest.raises(InputError, match=message):
        knee(x, y)
