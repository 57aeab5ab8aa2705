"""Schedules: how much, at which step.

One form for all: a frozen dataclass that is called with a step (an int from 0) and returns a fraction. For `Once`,
`Linear`, `Cubic` and `Frames` this is the sparsity to have at that step; for `Cosine` and `PruneAndGrow` the fraction
of the kept weights to exchange, where `PruneAndGrow` returns 0.0 at a step without an exchange. Nothing is remembered
between calls, so that training can resume at any step.

Examples:
    >>> [round(Cubic(sparsity=0.9, end=4)(step), 3) for step in range(6)]
    [0.0, 0.52, 0.787, 0.886, 0.9, 0.9]
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from ..checks import check_int, check_nm, check_range, check_sparsity, fail

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Once:
    """Nothing before step ``start``, then ``sparsity``; with ``start`` 0 a constant."""

    sparsity: float
    start: int = 0

    def __post_init__(self) -> None:
        check_sparsity("Once", self.sparsity)
        check_int("Once", "start", self.start, 0)

    def __call__(self, step: int) -> float:
        """The sparsity at ``step``."""
        check_int("Once", "step", step, 0)
        return self.sparsity if step >= self.start else 0.0


@dataclass(frozen=True, kw_only=True)
class _Ramp:
    """``s_f + (s_i - s_f) (1 - (t - t_0) / (t_end - t_0)) ** power``, where t moves in jumps of ``every`` and at the
    end.
    """

    sparsity: float
    start: int = 0
    end: int
    initial: float = 0.0
    every: int = 1
    power: ClassVar[int]

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_sparsity(name, self.sparsity)
        check_sparsity(name, self.initial, "initial")
        check_int(name, "start", self.start, 0)
        check_int(name, "end", self.end, self.start + 1)
        check_int(name, "every", self.every)

    def __call__(self, step: int) -> float:
        """The sparsity at ``step``."""
        check_int(type(self).__name__, "step", step, 0)
        if step >= self.end:
            return self.sparsity
        passed = max(0, step - self.start) // self.every * self.every
        left = 1 - passed / (self.end - self.start)
        return self.sparsity + (self.initial - self.sparsity) * left**self.power


class Linear(_Ramp):
    """From ``initial`` until step ``start`` in a straight line to ``sparsity`` from step ``end`` on.

    Args:
        sparsity: final.
        start: first step of the ramp.
        end: the step at which ``sparsity`` is reached, after ``start``.
        initial: sparsity before the ramp; may be above the final one.
        every: steps between two changes.
    """

    power = 1


class Cubic(_Ramp):
    """As `Linear`, but fast at first, when there is most to remove: ``s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3``.

    Paper: Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878, Eq. 1, with s_f ``sparsity``, s_i ``initial``,
    t_0 ``start``, dt ``every`` and t_0 + n dt ``end``.
    """

    power = 3


@dataclass(frozen=True)
class Cosine:
    """From ``fraction`` at step ``start`` along half a cosine to ``low`` at step ``end``, constant outside.

    ``low + (fraction - low) / 2 (1 + cos(pi (t - start) / (end - start)))``. Paper: Evci et al. 2020 (RigL),
    https://arxiv.org/abs/1911.11134, Section 3 (2), with fraction alpha = 0.3, low = 0, end = T_end.
    """

    fraction: float = 0.3
    start: int = 0
    end: int = field(kw_only=True)
    low: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        check_range("Cosine", "fraction", self.fraction, 0, 1)
        check_range("Cosine", "low", self.low, 0, self.fraction)
        check_int("Cosine", "start", self.start, 0)
        check_int("Cosine", "end", self.end, self.start + 1)

    def __call__(self, step: int) -> float:
        """The fraction at ``step``."""
        check_int("Cosine", "step", step, 0)
        done = min(1.0, max(0.0, (step - self.start) / (self.end - self.start)))
        return self.low + (self.fraction - self.low) / 2 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class PruneAndGrow:
    """When to exchange weights, and which fraction: every ``every`` steps after ``start`` and before ``end``.

    RigL: ``PruneAndGrow(Cosine(0.3, end=e), every=100, end=e)`` with e three quarters of the training (Evci et al.
    2020, https://arxiv.org/abs/1911.11134). SET: ``PruneAndGrow(Once(0.3), every=steps_per_epoch)`` (Mocanu et al.
    2018, https://arxiv.org/abs/1707.04780).

    Args:
        fraction: the fraction of the kept weights to drop, and to grow elsewhere, by step; any schedule.
        every: steps between two exchanges.
        start: the first exchange is at ``start + every``.
        end: there is none at this step or later; None goes on for ever.

    Examples:
        >>> exchange = PruneAndGrow(Once(0.3), every=100, end=300)
        >>> [step for step in range(1000) if exchange(step)]
        [100, 200]
    """

    fraction: Schedule
    every: int = 100
    start: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.fraction):
            raise fail("PruneAndGrow", "fraction", "be a schedule", repr(self.fraction))
        check_int("PruneAndGrow", "every", self.every)
        check_int("PruneAndGrow", "start", self.start, 0)
        if self.end is not None:
            check_int("PruneAndGrow", "end", self.end, self.start + 1)

    def __call__(self, step: int) -> float:
        """The fraction to exchange at ``step``; 0.0 where nothing is to be done."""
        check_int("PruneAndGrow", "step", step, 0)
        due = step > self.start and (step - self.start) % self.every == 0
        return self.fraction(step) if due and (self.end is None or step < self.end) else 0.0


@dataclass(frozen=True)
class Frames:
    """A sequence of N:M patterns, each for an equal number of steps between ``start`` and ``end``; then the last one.

    Paper: Bambhaniya et al. 2024, https://arxiv.org/abs/2402.04744 (structure decay, SdGf); see `stepwise`,
    `geometric`.

    Args:
        stages: (n, m) pairs, first to last.
        start: before it everything is kept, as 1:1.
        end: the last pattern stays from here on; at least as many steps after ``start`` as there are stages.

    Examples:
        >>> frames = Frames.stepwise(1, 4, end=30)
        >>> [frames.nm(step) for step in (0, 10, 20, 99)]
        [(3, 4), (2, 4), (1, 4), (1, 4)]
    """

    stages: tuple[tuple[int, int], ...]
    start: int = 0
    end: int = field(kw_only=True)

    def __post_init__(self) -> None:
        if not self.stages:
            raise fail("Frames", "stages", "have at least one pattern", self.stages)
        for n, m in self.stages:
            check_nm("Frames", n, m)
        check_int("Frames", "start", self.start, 0)
        check_int("Frames", "end", self.end, self.start + len(self.stages))

    @classmethod
    def stepwise(cls, n: int, m: int, *, start: int = 0, end: int) -> "Frames":
        """Sparser and sparser, M - 1 : M, M/2 : M, M/4 : M ... N : M (SdGf-Stepwise)."""
        check_nm("Frames.stepwise", n, m)
        halves = [m >> i for i in range(1, m.bit_length()) if m >> i > n]
        kept = sorted({max(n, m - 1), *halves, n}, reverse=True)
        return cls(tuple((count, m) for count in kept), start, end=end)

    @classmethod
    def geometric(cls, n: int, m: int, *, start: int = 0, end: int) -> "Frames":
        """Finer and finer at one sparsity, 8N : 8M, 4N : 4M, 2N : 2M, N : M (SdGf-Geometric); 8M must divide a row."""
        check_nm("Frames.geometric", n, m)
        return cls(tuple((scale * n, scale * m) for scale in (8, 4, 2, 1)), start, end=end)

    def nm(self, step: int) -> tuple[int, int]:
        """The pattern (n, m) at ``step``."""
        check_int("Frames", "step", step, 0)
        if step < self.start:
            return 1, 1
        frame = (step - self.start) * len(self.stages) // (self.end - self.start)
        return self.stages[min(frame, len(self.stages) - 1)]

    def __call__(self, step: int) -> float:
        """The sparsity at ``step``."""
        n, m = self.nm(step)
        return 1 - n / m
