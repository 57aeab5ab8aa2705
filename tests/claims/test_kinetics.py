"""The two claims of Kinetics at sizes that take no time, and how their verdicts follow from the figures."""

import pytest

from paucity.claims import CLAIMS, kinetics_attention_dominates, kinetics_model_within_20_percent

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def test_the_model_is_held_against_the_clock(small_probes, monkeypatch):
    module = kinetics_model_within_20_percent
    monkeypatch.setattr(module, "LLAMAS", {"50M": TINY})
    monkeypatch.setattr(module, "COMMON", {"head_dim": 8, "vocab_size": 64})
    monkeypatch.setattr(module, "DECODES", ((7, 2),))
    monkeypatch.setattr(module, "PREFILLS", ((9, 1),))
    monkeypatch.setattr(module, "QUICK_ROUNDS", 1)
    result = module.run(quick=True, seed=1)
    assert (result.claim, result.statement) == (module.NAME, CLAIMS[module.NAME].statement)
    rows = result.measured["cases"]
    assert [(row["kind"], row["tokens"], row["batch"]) for row in rows] == [("decode", 7, 2), ("prefill", 9, 1)]
    for row in rows:
        assert row["error"] == pytest.approx(row["predicted_ms"] / row["ms"] - 1)
        assert sum(row["parts_ms"].values()) == pytest.approx(row["predicted_ms"])
    assert result.holds is (result.measured["median_error"] <= 0.2)
    assert result.measured["worst_error"] == max(abs(row["error"]) for row in rows)


def test_attention_is_counted_and_timed(small_probes, monkeypatch):
    module = kinetics_attention_dominates
    monkeypatch.setattr(module, "LLAMAS", {"small": {}, "large": {}})
    monkeypatch.setattr(module, "COMMON", TINY | {"vocab_size": 64})
    monkeypatch.setattr(module, "QUICK_CONTEXTS", (4, 8))
    monkeypatch.setattr(module, "QUICK_ROUNDS", 1)
    result = module.run(quick=True, seed=1)
    assert [row["model"] for row in result.measured["models"]] == list(module.QWEN3)
    assert [[row["context"] for row in timed["contexts"]] for timed in result.measured["timed"]] == [[4, 8], [4, 8]]
    assert isinstance(result.holds, bool)


RISING = {"small": {1: 0.3, 4: 0.9}, "large": {1: 0.2, 4: 0.7}}


def test_the_verdict_on_attention():
    module = kinetics_attention_dominates
    found = module.counted(module.qwen3())
    assert found["models"][0]["phi_4096"] == pytest.approx(111, abs=2)
    assert found["cache_growth_when_parameters_double"] == pytest.approx(1.16, abs=0.03)
    assert found["largest_over_smallest_by_parameters"] > 40 > 4 > found["largest_over_smallest_by_eflops"]
    assert module.holds(found, RISING)
    assert not module.holds(found, RISING | {"large": {1: 0.2, 4: 0.4}})
    assert not module.holds(found, RISING | {"large": {1: 0.8, 4: 0.7}})
    assert not module.holds(found, RISING | {"large": {1: 0.2, 4: 0.95}})
    assert not module.holds(found | {"cache_growth_when_parameters_double": 1.6}, RISING)
    assert not module.holds(found | {"largest_over_smallest_by_eflops": 30}, RISING)
