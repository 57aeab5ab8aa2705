import math

import numpy as np
import pytest
from scipy.stats import binomtest

from paucity.checks import InputError
from paucity.measure.stats import mean_interval, ratio_interval, share_change, share_interval


@pytest.mark.parametrize(("right", "total"), [(0, 1), (0, 20), (7, 20), (20, 20), (500, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_share_matches_scipy(right, total, confidence):
    got = share_interval([1.0] * right + [0.0] * (total - right), confidence=confidence)
    expected = binomtest(right, total).proportion_ci(confidence, method="wilson")
    assert (got.value, got.num_samples) == (right / total, total)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(100):
        got = mean_interval(rng.normal(3, 1, 40).tolist(), seed=seed, num_resamples=300)
        inside += got.low <= 3 <= got.high
    assert 86 <= inside <= 99


def test_ratio():
    top, bottom = [100.0 + i for i in range(5)] + [1.0] * 5, [100.0] * 5 + [0.1] * 5
    got = ratio_interval(top, bottom, seed=1)
    assert got == ratio_interval(top, bottom, seed=1)
    assert got.low != ratio_interval(top, bottom, seed=2).low
    assert got.value == sum(top) / sum(bottom)
    assert 1 <= got.low < got.value < got.high <= 1.2  # the small ones count little
    mapped = got.mapped(math.exp)
    assert (mapped.value, mapped.low) == (math.exp(got.value), math.exp(got.low))
    assert ratio_interval([1.0], [2.0]).low is None


def test_bad_input():
    with pytest.raises(InputError, match="at least one sample"):
        mean_interval([])
    with pytest.raises(InputError, match="have 2 samples, got 1"):
        ratio_interval([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match=r"confidence must be in \(0, 1\), got 1"):
        share_interval([1.0], confidence=1)
    with pytest.raises(InputError, match=r"scores must be in \[0, 1\], got 2"):
        share_interval([2.0])


def test_change_of_paired_shares():
    # Newcombe 1998, Table II: 36 pairs both right, 12 the first alone, 2 the second alone, none neither; method 10:
    # 0.2 with 0.0569 to 0.3404.
    first, second = [1] * 36 + [1] * 12 + [0] * 2, [1] * 36 + [0] * 12 + [1] * 2
    change = share_change(first, second)
    assert change.value == pytest.approx(0.2)
    assert (change.low, change.high) == pytest.approx((0.0569, 0.3404), abs=2e-3)
    back = share_change(second, first)
    assert (back.low, back.high) == pytest.approx((-change.high, -change.low))
    same = share_change([1.0] * 10, [1.0] * 10)
    assert same.value == 0
    assert same.low < -0.2  # ten agreeing pairs prove little
    assert same.high > 0.2
    with pytest.raises(InputError, match="baseline must have 2 scores, got 1"):
        share_change([0, 1], [1])
