"""Where a falling curve turns: a broken line through its points, and how far it goes before a given drop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..checks import check_range, fail

_CANDIDATES = 401
_MIN_POINTS = 5
_POWERS = np.linspace(1, 8, 71)


@dataclass(frozen=True)
class Knee:
    """Two lines that meet, fitted to the points of a curve.

    Attributes:
        x: where they meet.
        y: their height there.
        slope_before: of the first line.
        slope_after: of the second, the lower of the two.
        residual: root mean square distance of the points from the broken line.
        straight_residual: the same from one straight line.
        smooth_residual: the same from the best curve ``a + b (x - x_0)^p`` with p from 1 to 8, which has no knee.
        num_points: points that were fitted.
    """

    x: float
    y: float
    slope_before: float
    slope_after: float
    residual: float
    straight_residual: float
    smooth_residual: float
    num_points: int

    @property
    def ratio(self) -> float:
        """How many times faster the curve falls after the knee; inf where it does not fall before it.

        Smooth curves have one, too: a parabola that starts level 3 to 5, a cubic 7 to 8. Whether a curve turns at one
        place, `is_sharp` tells.
        """
        return self.slope_after / self.slope_before if self.slope_before < 0 else math.inf

    @property
    def is_sharp(self) -> bool:
        """Whether the broken line fits better than a smooth curve does."""
        return self.residual < self.smooth_residual


def knee(x: Sequence[float], y: Sequence[float], *, until: float | None = None) -> Knee | None:
    """The continuous broken line ``y = a + b x + c max(0, x - t)`` of least squares that falls faster after t.

    t is searched between the second and the second last point. A sigmoid turns twice; with ``until`` only the turn
    downwards is fitted.

    Args:
        x: rising, each value once.
        y: as many, finite.
        until: leave out what comes after the first point at or below this height.

    Returns:
        None where fewer than 5 points are left, or no broken line that turns downwards and then falls fits better
        than a straight one.

    Raises:
        InputError: if the numbers differ, x does not rise or a value is not finite.

    Examples:
        >>> turn = knee([0, 1, 2, 3, 4, 5], [1.0, 1.0, 1.0, 1.0, 0.5, 0.0])
        >>> round(turn.x, 3), round(turn.slope_after, 3)
        (3.0, -0.5)
    """
    xs, ys = _curve("knee", x, y)
    if until is not None:
        check_range("knee", "until", until)
        below = np.flatnonzero(ys <= until)
        last = len(ys) if not len(below) else int(below[0]) + 1
        xs, ys = xs[:last], ys[:last]
    if len(xs) < _MIN_POINTS:
        return None
    straight = np.stack([np.ones_like(xs), xs], axis=1)
    error = _rms(straight, ys)[1]
    along = xs - xs[0]
    smooth = min(_rms(np.column_stack([np.ones_like(xs), along**power]), ys)[1] for power in _POWERS)
    best: Knee | None = None
    candidates = np.unique(np.concatenate([xs[1:-1], np.linspace(xs[1], xs[-2], _CANDIDATES)]))
    for turn in candidates.tolist():
        fit, residual = _rms(np.column_stack([straight, np.maximum(0.0, xs - turn)]), ys)
        before, after = float(fit[1]), float(fit[1] + fit[2])
        if after < min(before, 0.0) and residual < (error if best is None else best.residual) - 1e-9:
            height = float(fit[0] + fit[1] * turn)
            best = Knee(turn, height, before, after, residual, error, smooth, len(xs))
    return best


def last_above(x: Sequence[float], y: Sequence[float], *, level: float) -> float | None:
    """The x at which a curve first goes below ``level``, on the straight line between two points.

    Returns:
        None if the first point is below it, the last x if none is.

    Raises:
        InputError: as `knee`.

    Examples:
        >>> last_above([0, 1, 2], [1.0, 1.0, 0.5], level=0.75)
        1.5
    """
    xs, ys = _curve("last_above", x, y)
    check_range("last_above", "level", level)
    below = np.flatnonzero(ys < level)
    if not len(below):
        return float(xs[-1])
    at = int(below[0])
    if at == 0:
        return None
    share = (ys[at - 1] - level) / (ys[at - 1] - ys[at])
    return float(xs[at - 1] + share * (xs[at] - xs[at - 1]))


def _rms(columns: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients of least squares and the root mean square of what they leave."""
    fit = np.linalg.lstsq(columns, values, rcond=None)[0]
    return fit, float(np.sqrt(np.mean((columns @ fit - values) ** 2)))


def _curve(function: str, x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    if len(x) != len(y):
        raise fail(function, "y", f"have {len(x)} values", len(y))
    if not len(x):
        raise fail(function, "x", "hold at least one value", "none")
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    for argument, values in (("x", xs), ("y", ys)):
        if not np.isfinite(values).all():
            raise fail(function, argument, "hold finite numbers", values.tolist())
    if (np.diff(xs) <= 0).any():
        raise fail(function, "x", "rise from value to value", xs.tolist())
    return xs, ys
