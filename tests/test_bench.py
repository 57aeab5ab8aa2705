"""Benchmarks: the rows keep their contract, and every one can be found."""

import importlib

import pytest

from paucity.bench import BENCHES, BenchRow


def test_a_row_is_the_contract():
    row = BenchRow("b", "size", "ours", "dense", seconds=2.0, baseline_seconds=3.0, limit_ratio=4.0).to_json()
    assert list(row) == [*("bench", "size", "ours", "baseline", "seconds", "baseline_seconds", "ratio", "limit_ratio")]
    assert row["ratio"] == 1.5


@pytest.mark.parametrize("name", BENCHES)
def test_every_benchmark_is_there(name):
    assert callable(importlib.import_module(f"paucity.bench.{name}").run)


def test_the_attention_benchmark_times_what_it_says(monkeypatch):
    from paucity.bench import attention

    monkeypatch.setattr(attention, "SHAPE", {"batch": 1, "heads": 2, "tokens": 512, "dim": 16})
    rows = {row.bench: row for row in attention.run()}
    assert rows["attention.block100.fp32"].limit_ratio == pytest.approx(1.0)
    assert rows["attention.block10.fp32"].limit_ratio > 1.5
    assert all(row.seconds > 0 and row.baseline_seconds > 0 for row in rows.values())
