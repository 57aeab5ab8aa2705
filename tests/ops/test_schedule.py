import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paucity.checks import InputError, InputTypeError
from paucity.ops.schedule import Cosine, Cubic, Frames, Linear, Once, PruneAndGrow

few = settings(max_examples=60, derandomize=True, deadline=None)
SPARSITIES = {
    "once": Once(0.75, start=10),
    "linear": Linear(sparsity=0.75, start=10, end=90, every=7),
    "cubic": Cubic(sparsity=0.75, start=10, end=90, every=7),
    "frames": Frames.stepwise(1, 4, start=10, end=90),
}
ALL = SPARSITIES | {
    "cosine": Cosine(0.3, start=10, end=90),
    "prune_and_grow": PruneAndGrow(Cosine(0.3, end=75), every=10, end=75),
}


@pytest.mark.parametrize("name", ALL)
def test_every_schedule_has_the_form(name):
    schedule = ALL[name]
    values = [schedule(step) for step in range(200)]
    assert all(isinstance(value, float) and 0 <= value < 1 for value in values)
    assert values == [schedule(step) for step in range(200)]
    assert schedule == dataclasses.replace(schedule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.start = 3
    with pytest.raises(InputError, match="step must be at least 0, got -1"):
        schedule(-1)
    with pytest.raises(InputTypeError, match=r"step must be an integer, got 1.0"):
        schedule(1.0)


@pytest.mark.parametrize("name", SPARSITIES)
def test_sparsity_rises_from_dense_to_the_target(name):
    values = [SPARSITIES[name](step) for step in range(200)]
    assert set(values[:10]) == {0.0}
    assert values == sorted(values)
    assert set(values[90:]) == {0.75}
    assert values.index(0.75) <= 90


@few
@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 9), st.floats(0, 0.9), st.floats(0, 0.9))
def test_ramps_match_the_equation(start, count, every, first, final):
    """At t = t0 + i dt: s_f + (s_i - s_f)(1 - i / n)^power, held until the next."""
    end = start + count * every
    ramps = {
        1: Linear(sparsity=final, initial=first, start=start, end=end, every=every),
        3: Cubic(sparsity=final, initial=first, start=start, end=end, every=every),
    }
    for power, ramp in ramps.items():
        for i in range(count + 1):
            expect = final + (first - final) * (1 - i / count) ** power
            assert ramp(start + i * every) == pytest.approx(expect)
            assert ramp(start + i * every + every - 1) == pytest.approx(expect)


def test_ramp_ends_off_the_grid():
    ramp = Linear(sparsity=0.5, end=10, every=4)
    assert [ramp(step) for step in (3, 4, 8, 9, 10)] == pytest.approx([0, 0.2, 0.4, 0.4, 0.5])


def test_cosine_matches_the_equation():
    schedule = Cosine(0.3, start=5, end=25, low=0.1)
    for step in range(5, 26):
        assert schedule(step) == pytest.approx(0.1 + 0.1 * (1 + math.cos((step - 5) * math.pi / 20)))
    assert (schedule(0), schedule(5), schedule(15), schedule(99)) == pytest.approx((0.3, 0.3, 0.2, 0.1))


def test_prune_and_grow_follows_its_calendar():
    exchange = PruneAndGrow(Cosine(0.4, end=90), every=10, start=20, end=60)
    assert {step for step in range(100) if exchange(step)} == {30, 40, 50}
    assert exchange(30) == Cosine(0.4, end=90)(30)
    assert [step for step in range(10) if PruneAndGrow(Once(0.3), every=3)(step)] == [3, 6, 9]


@pytest.mark.parametrize(
    ("frames", "stages"),
    [
        (Frames.stepwise(1, 4, end=9), ((3, 4), (2, 4), (1, 4))),
        (Frames.stepwise(2, 8, end=9), ((7, 8), (4, 8), (2, 8))),
        (Frames.stepwise(1, 2, end=9), ((1, 2),)),
        (Frames.stepwise(3, 16, end=9), ((15, 16), (8, 16), (4, 16), (3, 16))),
        (Frames.stepwise(4, 4, end=9), ((4, 4),)),
        (Frames.geometric(2, 4, end=9), ((16, 32), (8, 16), (4, 8), (2, 4))),
    ],
)
def test_frames_stages(frames, stages):
    assert frames.stages == stages


@few
@given(st.integers(0, 9), st.integers(1, 6), st.integers(1, 7))
def test_frames_are_equal(start, count, length):
    stages = tuple((n, 8) for n in range(count, 0, -1))
    frames = Frames(stages, start, end=start + count * length)
    seen = [frames.nm(step) for step in range(start + count * length + 3)]
    assert seen == [(1, 1)] * start + [stage for stage in stages for _ in range(length)] + [stages[-1]] * 3
    assert frames(start) == 1 - count / 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Once(1.0), r"Once: sparsity must be in \[0, 1\), got 1.0"),
        (lambda: Cubic(sparsity=0.5, start=5, end=5), "Cubic: end must be at least 6, got 5"),
        (lambda: Linear(sparsity=0.5, end=5, initial=-0.1), r"Linear: initial must be in \[0, 1\), got -0.1"),
        (lambda: Linear(sparsity=0.5, end=5, every=0), "Linear: every must be at least 1, got 0"),
        (lambda: Cosine(0.3, end=5, low=0.4), r"Cosine: low must be in \[0, 0.3\], got 0.4"),
        (lambda: PruneAndGrow(0.3), "PruneAndGrow: fraction must be a schedule, got 0.3"),
        (lambda: PruneAndGrow(Once(0.3), every=0), "PruneAndGrow: every must be at least 1, got 0"),
        (lambda: Frames((), end=5), "Frames: stages must have at least one pattern"),
        (lambda: Frames(((3, 2),), end=5), r"Frames: n must be at most m \(2\), got 3"),
        (lambda: Frames.stepwise(1, 8, end=3), "Frames: end must be at least 4, got 3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
