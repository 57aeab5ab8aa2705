"""The comparison with kvpress, against a stand-in that cuts nothing, in a process of its own."""

import sys

import pytest

from paucity.bench import BENCHES, evict, kvpress
from paucity.models.load import Loaded, byte_tokenizer

STAND_IN = """
import contextlib

class Press:
    def __init__(self, compression_ratio):
        self.compression_ratio = compression_ratio
    @contextlib.contextmanager
    def __call__(self, model):
        yield

class AdaKVPress:
    def __init__(self, press):
        self.press = press
    def __call__(self, model):
        return self.press(model)

SnapKVPress = ExpectedAttentionPress = KnormPress = StreamingLLMPress = TOVAPress = Press
"""
SMALL = {"DENSITIES": (0.5,), "NUM_PROMPTS": 1, "NUM_TEXTS": 1, "CONTINUED": 4, "TIMED": 300, "ROUNDS": 1, "STEPS": 2}


@pytest.fixture
def small(tiny_model, monkeypatch):
    model = tiny_model("llama", vocab_size=300)
    model.config.max_position_embeddings = 4096
    monkeypatch.setattr(evict, "load", lambda name: Loaded(model, byte_tokenizer(300), "tiny"))
    monkeypatch.setattr(evict, "held_out_python", lambda: "def f(x):\n    return x\n" * 200)
    for name, value in (SMALL | {"LENGTH": 1200}).items():
        monkeypatch.setattr(evict, name, value)
    monkeypatch.delenv(kvpress.VARIABLE, raising=False)


def test_without_kvpress_it_is_dense_that_is_compared_with(small, monkeypatch):
    assert "evict" in BENCHES
    monkeypatch.setattr(kvpress.importlib.util, "find_spec", lambda name: None)
    rows = evict.run()
    assert [row.bench for row in rows] == [f"evict.{name}.50" for name in evict.METHODS]
    assert all(row.ratio > 0 and row.baseline == "dense" and "bits per byte" in row.ours for row in rows)


def test_a_peer_answers_the_same_prompts_in_turns(small, tmp_path, monkeypatch):
    (tmp_path / "kvpress.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(kvpress.VARIABLE, sys.executable)
    monkeypatch.setattr(evict, "METHODS", {name: evict.METHODS[name] for name in ("ada_kv", "knorm")})
    names = ["evict.ada_kv.50", "evict.kvpress.ada_kv.50", "evict.knorm.50", "evict.kvpress.knorm.50", "evict.kvpress"]
    rows = evict.run()
    assert [row.bench for row in rows] == names
    assert all(row.seconds > 0 and row.baseline_seconds > 0 and row.limit_ratio > 0 for row in rows)
    # The stand-in cuts nothing, and so is dense: the same quality, to what bfloat16 and float32 differ.
    dense, theirs = (rows[i].size.split("bits per byte")[0].split()[-1] for i in (0, 1))
    assert float(theirs) == pytest.approx(float(dense), rel=0.02)
