"""Intervals of confidence for what is measured: seeded bootstrap for means, Wilson for shares, Newcombe for changes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..checks import check_int, check_range, fail


@dataclass(frozen=True)
class Estimate:
    """A measured value and the interval that holds the true one with the stated confidence.

    ``low`` and ``high`` are None where fewer than two samples leave no interval.
    """

    value: float
    low: float | None
    high: float | None
    num_samples: int
    confidence: float = 0.95

    def mapped(self, function: Callable[[float], float]) -> "Estimate":
        """The estimate of a rising ``function`` of the value, such as a change of unit or the exponential."""
        low = None if self.low is None else function(self.low)
        high = None if self.high is None else function(self.high)
        return Estimate(function(self.value), low, high, self.num_samples, self.confidence)


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """``sum(numerators) / sum(denominators)`` with a percentile bootstrap over the pairs.

    Nats over tokens, window by window, is the case in mind. Windows of one text are not quite independent, so the
    interval speaks of the text at hand and is a little narrow.

    Raises:
        InputError: if there are no samples, the numbers of both differ, or the denominators do not sum above 0.
    """
    check_range("ratio_interval", "confidence", confidence, 0, 1, open_low=True, open_high=True)
    check_int("ratio_interval", "num_resamples", num_resamples)
    if not len(numerators):
        raise fail("ratio_interval", "numerators", "hold at least one sample", "none")
    if len(numerators) != len(denominators):
        raise fail("ratio_interval", "denominators", f"have {len(numerators)} samples", len(denominators))
    if not sum(denominators) > 0:
        raise fail("ratio_interval", "denominators", "sum to more than 0", sum(denominators))
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    value = float(top.sum() / bottom.sum())
    if len(top) < 2 or not math.isfinite(value):
        return Estimate(value, None, None, len(top), confidence)
    interval = stats.bootstrap(
        (top, bottom),
        lambda a, b, axis=-1: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=num_resamples,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), len(top), confidence)


def mean_interval(
    values: Sequence[float], *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of ``values`` with a percentile bootstrap interval; see `ratio_interval`."""
    ones = [1.0] * len(values)
    return ratio_interval(values, ones, confidence=confidence, num_resamples=num_resamples, seed=seed)


def share_interval(scores: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """Mean of ``scores`` in [0, 1] with the interval of Wilson 1927, sound also where all scores are 0 or 1.

    For scores strictly between 0 and 1 (recall of several answers) it is on the safe side, as no score in [0, 1]
    varies more than a 0-or-1 score of the same mean.

    Raises:
        InputError: if there are no scores, or one lies outside [0, 1].
    """
    check_range("share_interval", "confidence", confidence, 0, 1, open_low=True, open_high=True)
    if not len(scores):
        raise fail("share_interval", "scores", "hold at least one score", "none")
    for score in scores:
        check_range("share_interval", "scores", score, 0, 1)
    num = len(scores)
    share = math.fsum(scores) / num
    z = float(stats.norm.ppf((1 + confidence) / 2))
    center = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    low, high = (0.0 if share == 0 else center - half), (1.0 if share == 1 else center + half)  # exact at the ends
    return Estimate(share, low, high, num, confidence)


def share_change(scores: Sequence[float], baseline: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """Mean of ``scores - baseline``, both in [0, 1] and of the same samples in the same order.

    The interval is that of Newcombe 1998 for paired shares (his method 10 without the continuity correction): Wilson's
    intervals of both, joined through their correlation. It stays open where all pairs agree, which a bootstrap does
    not, and errs on the safe side for scores strictly between 0 and 1.

    Raises:
        InputError: if there are no scores, their numbers differ, or one lies outside [0, 1].
    """
    if len(scores) != len(baseline):
        raise fail("share_change", "baseline", f"have {len(scores)} scores", len(baseline))
    new, old = share_interval(scores, confidence=confidence), share_interval(baseline, confidence=confidence)
    spread = np.std(scores) * np.std(baseline)
    related = float(np.cov(scores, baseline, ddof=0)[0, 1] / spread) if spread > 0 else 0.0

    def joined(one: Estimate, other: Estimate) -> float:
        """From ``one`` down to its lower end and from ``other`` up to its upper one, as sides of a triangle."""
        down, up = one.value - (one.low or 0.0), (other.high or 0.0) - other.value
        return math.sqrt(max(0.0, down * down - 2 * related * down * up + up * up))

    change = new.value - old.value
    low, high = max(-1.0, change - joined(new, old)), min(1.0, change + joined(old, new))
    return Estimate(change, low, high, new.num_samples, confidence)
