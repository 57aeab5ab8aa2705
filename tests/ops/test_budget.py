import math
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from paucity.checks import InputError
from paucity.ops.budget import erk, greedy, outlier_ratio, owl, uniform, uniform_plus, zipf

few = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
net = {"stem": (16, 3, 3, 3), "body": (32, 16, 3, 3), "wide": (64, 288), "head": (10, 64)}
some_shapes = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6).map(
    lambda shapes: {f"layer{i}": shape for i, shape in enumerate(shapes)}
)
fraction = st.floats(0, 0.99)


def quadratic(trial):
    """Each layer's own curve: later layers (by name) suffer more."""
    return sum((i + 1) * trial[name] ** 2 for i, name in enumerate(sorted(trial)))


def by_size(shapes):
    return {name: float(math.prod(shape)) for name, shape in shapes.items()}


ALLOCATORS = {
    "uniform": uniform,
    "erk": erk,
    "owl": lambda shapes, sparsity: owl(shapes, sparsity=sparsity, outlier_ratio=by_size(shapes)),
    "greedy": lambda shapes, sparsity: greedy(shapes, sparsity=sparsity, loss=quadratic, step=0.2),
    "uniform_plus": uniform_plus,
}


@pytest.mark.parametrize("name", ALLOCATORS)
@few
@given(shapes=some_shapes, sparsity=fraction)
def test_meets_the_overall_sparsity(name, shapes, sparsity):
    try:
        result = ALLOCATORS[name](shapes, sparsity=sparsity)
    except InputError:
        assert name in ("owl", "uniform_plus")
        assume(False)
    assert list(result) == list(shapes)
    assert all(0 <= value < 1 for value in result.values())
    sizes = by_size(shapes)
    assert sum(result[key] * sizes[key] for key in sizes) == pytest.approx(sparsity * sum(sizes.values()), abs=1e-6)


@few
@given(shapes=some_shapes, sparsity=st.floats(0.01, 0.99))
def test_erk_matches_the_dense_loop(shapes, sparsity):
    """The published loop: solve for epsilon, make the layers of the largest raw density dense, repeat."""
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    size, dense = by_size(shapes), set()
    while True:
        rest = [name for name in shapes if name not in dense]
        budget = sum(size[n] * (1 - sparsity) for n in rest) - sum(size[n] * sparsity for n in dense)
        epsilon = budget / sum(raw[n] * size[n] for n in rest)
        largest = max(raw[n] for n in rest)
        if epsilon * largest <= 1 + 1e-12:
            break
        dense |= {n for n in rest if raw[n] == largest}
    expect = {name: 0.0 if name in dense else 1 - epsilon * raw[name] for name in shapes}
    assert erk(shapes, sparsity=sparsity) == pytest.approx(expect, abs=1e-9)


def test_uniform_plus_protects_the_ends():
    mild, strong = uniform_plus(net, sparsity=0.5), uniform_plus(net, sparsity=0.9)
    assert mild["stem"] == strong["stem"] == 0
    assert mild["head"] == mild["body"] == mild["wide"]
    assert strong["head"] == pytest.approx(0.8)
    assert strong["body"] == strong["wide"] > 0.9
    sizes = by_size(net)
    for sparsity, result in ((0.5, mild), (0.9, strong)):
        assert sum(result[n] * sizes[n] for n in net) == pytest.approx(sparsity * sum(sizes.values()))
    assert uniform_plus(net, sparsity=0.5, first="body")["body"] == 0
    assert set(uniform_plus(net, sparsity=0.0).values()) == {0.0}


def test_owl_follows_the_paper():
    shapes = dict.fromkeys(["a", "b", "c"], (8, 8))
    result = owl(shapes, sparsity=0.7, outlier_ratio={"a": 0.1, "b": 0.2, "c": 0.3})
    assert result == pytest.approx({"a": 0.78, "b": 0.7, "c": 0.62})
    skewed = owl({**shapes, "a": (8, 80)}, sparsity=0.7, outlier_ratio={"a": 0.1, "b": 0.2, "c": 0.3})
    assert skewed["a"] - skewed["c"] == pytest.approx(0.16)
    assert (10 * skewed["a"] + skewed["b"] + skewed["c"]) / 12 == pytest.approx(0.7)


def test_outlier_ratio_counts():
    score = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) ** 8
    mean = sum(score.flatten().tolist()) / score.numel()
    expect = sum(value > 3 * mean for value in score.flatten().tolist()) / score.numel()
    assert outlier_ratio(score, multiple=3.0) == expect > 0


def test_greedy_matches_naive():
    """Equal sizes: a plain loop that adds one step to the cheapest member."""
    shapes = dict.fromkeys("abcd", (4, 4))
    state = dict.fromkeys(shapes, 0.0)
    for _ in range(20):
        state = min((state | {n: state[n] + 0.1} for n in state if state[n] < 0.85), key=quadratic)
    assert greedy(shapes, sparsity=0.5, loss=quadratic, step=0.1, ceiling=0.9) == pytest.approx(state)
    assert state["a"] > state["d"]


def test_greedy_moves_equal_amounts_by_group():
    shapes, seen = {"a": (2, 2), "b": (6, 2), "c": (4, 4)}, []

    def loss(trial):
        seen.append(trial)
        return -trial.get("a", 0.0)

    result = greedy(shapes, sparsity=0.5, loss=loss, groups={"x": ["b", "a"], "y": ["c"]}, step=0.1, ceiling=0.9)
    assert result == pytest.approx({"a": 0.9, "b": (8 - 3.6) / 12, "c": 0.5})
    assert seen[:2] == [pytest.approx({"a": 0, "b": 0.8 / 12}), pytest.approx({"a": 0.2, "b": 0})]


@few
@given(st.integers(1, 30), st.integers(0, 500), st.integers(0, 3), st.integers(0, 4))
def test_zipf_is_the_largest_remainder(num, total, exponent, shift):
    weights = [Fraction(1, (i + shift) ** exponent) for i in range(1, num + 1)]
    exact = [total * weight / sum(weights) for weight in weights]
    result = zipf(num, total=total, exponent=float(exponent), shift=float(shift))
    assert sum(result) == total
    assert result == sorted(result, reverse=True)
    assert all(abs(got - want) < 1 for got, want in zip(result, exact, strict=True))
    up = [want - got for got, want in zip(result, exact, strict=True) if got < want]
    down = [want - got + 1 for got, want in zip(result, exact, strict=True) if got > want]
    assert not up or not down or max(up) <= min(down) + Fraction(1, 10**9)


@few
@given(st.integers(1, 20), st.integers(1, 9), st.data())
def test_zipf_within_a_limit(num, limit, data):
    total = data.draw(st.integers(0, num * limit))
    result = zipf(num, total=total, exponent=2.0, limit=limit)
    assert sum(result) == total
    assert max(result) <= limit
    assert result == sorted(result, reverse=True)


def test_zipf_at_extremes():
    assert zipf(4, total=7, exponent=5000.0) == [7, 0, 0, 0]
    assert zipf(4, total=7, exponent=5000.0, limit=3) == [3, 3, 1, 0]
    assert zipf(50_000, total=1_600_000, limit=4096)[0] == 4096


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform({}, sparsity=0.5), "uniform: shapes must have at least one entry, got none"),
        (lambda: erk({"a": (3, 0)}, sparsity=0.5), r"shape of a must have only sizes of at least 1, got \(3, 0\)"),
        (lambda: erk(net, sparsity=1.0), r"erk: sparsity must be in \[0, 1\), got 1.0"),
        (
            lambda: uniform_plus(net, sparsity=0.995),
            "sparsity must be reachable with stem, head kept denser, got 0.995",
        ),
        (lambda: uniform_plus(net, sparsity=0.5, first="stam"), r"got stam \(did you mean 'stem'\?\)"),
        (lambda: owl(net, sparsity=0.5, outlier_ratio={"stem": 0.1}), "an entry for every shape, got none for body"),
        (lambda: owl(net, sparsity=0.5, outlier_ratio={"x": 0.1}), "outlier_ratio must name only entries of shapes"),
        (lambda: owl(net, sparsity=0.01, outlier_ratio=by_size(net)), r"owl: spread must keep all layers in \[0, 1\)"),
        (lambda: greedy(net, sparsity=0.5, loss=lambda _: math.nan), "greedy: loss must return a number, got nan"),
        (lambda: greedy(net, sparsity=0.995, loss=quadratic), r"greedy: ceiling must be in \[0.995, 1\), got 0.99"),
        (lambda: greedy(net, sparsity=0.5, loss=quadratic, groups={"g": ["stem"]}), "hold every shape exactly once"),
        (lambda: outlier_ratio(torch.ones(0)), "outlier_ratio: score must have a finite mean, got nan"),
        (lambda: zipf(3, total=10, limit=3), "zipf: limit must be at least 4, got 3"),
        (lambda: zipf(0, total=1), "zipf: num must be at least 1, got 0"),
        (lambda: zipf(3, total=1, shift=-1.0), r"zipf: shift must be in \(-1, inf\), got -1.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
