"""Budgets by importance."""

import math

import pytest

from paucity.checks import InputError
from paucity.ops.budget_blocks import by_importance


def naive(sizes, sparsity, importance, sharpness):
    """The authors' code, by loops, for blocks of one size."""
    mean = sum(importance) / len(importance)
    share = [1 / (1 + math.exp(-sharpness * (value - mean))) for value in importance]
    average = sum(share) / len(share)
    if max(share) / average * (1 - sparsity) >= 1:
        scale = (average * (1 / (1 - sparsity) - 1)) / (max(share) - average) / 1.05
        share = [average + (value - average) * scale for value in share]
        average = sum(share) / len(share)
    return [1 - value / average * (1 - sparsity) for value in share]


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_matches_naive(sparsity, sharpness):
    importance = {"a": 0.3, "b": 1.7, "c": 0.9, "d": 1.1}
    found = by_importance(
        dict.fromkeys(importance, (4, 8)), sparsity=sparsity, importance=importance, sharpness=sharpness
    )
    assert list(found.values()) == pytest.approx(naive(None, sparsity, list(importance.values()), sharpness))


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.3, 0.8])
def test_the_target_is_met_and_more_importance_is_denser(sparsity):
    shapes = {"a": (10,), "b": (30, 2), "c": (5,)}
    found = by_importance(shapes, sparsity=sparsity, importance={"a": 3.0, "b": -40.0, "c": 800.0})
    sizes = {"a": 10, "b": 60, "c": 5}
    assert sum(found[name] * size for name, size in sizes.items()) / 75 == pytest.approx(sparsity)
    assert all(0 <= value < 1 for value in found.values())
    assert found["c"] <= found["a"] <= found["b"]
    assert sparsity == 0 or found["c"] < found["b"]


def test_bad_input():
    with pytest.raises(InputError, match="importance must have an entry for every shape, got none for b"):
        by_importance({"a": (1,), "b": (1,)}, sparsity=0.5, importance={"a": 1.0})
    with pytest.raises(InputError, match="importance of a must be"):
        by_importance({"a": (1,)}, sparsity=0.5, importance={"a": math.inf})
