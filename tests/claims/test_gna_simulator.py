"""The claim about the simulator at a small size: its figures are what they say."""

import pytest

from paucity.claims import gna_simulator
from paucity.claims.gna_simulator import rank_correlation, run


def test_small_run_reports_every_case_and_judges_by_the_figures(monkeypatch):
    cases = {(8, 8): (((4, 4), (4, 4)), ((3, 3), (1, 1))), (4, 4, 4): (((2, 2, 2), (2, 2, 2)),)}
    monkeypatch.setattr(gna_simulator, "QUICK_CASES", cases)
    monkeypatch.setattr(gna_simulator, "BLOCK", 8)
    result = run(quick=True)
    rows = result.measured["cases"]
    assert [row["perfect"] for row in rows] == [True, False, True]
    assert rows[0]["tile_bound"] == rows[0]["flop_bound"] == 4
    assert rows[1]["tile_bound"] < rows[1]["flop_bound"] == pytest.approx(64 * 64 / (24 * 24))
    assert all(row["measured"] > 0 for row in rows)
    figures = result.measured
    reached = sum(row["share_of_bound"] >= 0.9 for row in rows if row["perfect"])
    assert figures["perfect_cases_that_reach_it"] == reached
    assert result.holds == (figures["rank_correlation_with_tile_bound"] >= 0.9 and reached >= 1)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation([1, 1], [1, 2]) == 0
