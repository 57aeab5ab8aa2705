"""The claim about HiP's scaling at small sizes, and how its verdict follows from the exponents."""

import math

import pytest

from paucity.claims import CLAIMS, hip_scaling


def test_exponents_are_slopes():
    assert hip_scaling.exponent({10: 3.0, 100: 300.0, 1000: 30000.0}) == pytest.approx(2)
    lengths = (4096, 8192, 16384)
    assert 1.1 < hip_scaling.exponent({n: n * math.log2(n / 512) for n in lengths}) < 1.6


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, True),
        ({"selection": 2.0}, False),
        ({"attention": 1.5}, False),
        ({"dense": 1.2}, False),
        ({"total": 1.9}, False),
    ],
)
def test_verdict(changed, verdict):
    exponents = {"selection": 1.4, "products": 1.35, "attention": 1.0, "dense": 2.0, "total": 1.25}
    assert hip_scaling.holds(exponents | changed) is verdict


def test_it_runs_and_says_what_it_measured(monkeypatch):
    monkeypatch.setattr(hip_scaling, "QUICK_LENGTHS", (700, 1400))
    monkeypatch.setattr(hip_scaling, "REPEATS", 1)
    result = hip_scaling.run(quick=True, seed=1)
    assert (result.claim, result.statement) == ("hip-scaling", CLAIMS["hip-scaling"].statement)
    assert isinstance(result.holds, bool)
    assert [row["length"] for row in result.measured["by_length"]] == [700, 1400]
    assert all(0 < row["density"] < 1 for row in result.measured["by_length"])
    assert set(result.measured["exponents"]) == {"selection", "attention", "dense", "total", "products"}
