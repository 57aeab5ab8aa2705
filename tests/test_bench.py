"""Benchmarks: the rows keep their contract, and every one can be found."""

import importlib
import sys
import time

import pytest
import torch

from paucity.bench import BENCHES, BenchRow, attention, kernel_row, prefill, run_bench
from paucity.measure import machine
from paucity.measure.cost import Comparison, Timing

PATTERNS = ("block10", "block100", "stripes10", "window512")


def test_a_row_is_the_contract():
    row = BenchRow("b", "size", "ours", "dense", seconds=2.0, baseline_seconds=3.0, limit_ratio=4.0).to_json()
    assert list(row) == [*("bench", "size", "ours", "baseline", "seconds", "baseline_seconds", "ratio", "limit_ratio")]
    assert row["ratio"] == 1.5


@pytest.mark.parametrize("name", BENCHES)
def test_every_benchmark_is_there(name):
    assert callable(importlib.import_module(f"paucity.bench.{name}").run)


SMALL = {
    "activations": {
        "SIZES": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8},
        "VOCABULARY": 50,
    },
    "attention": {"SHAPE": {"batch": 1, "heads": 2, "tokens": 512, "dim": 16}},
    "convnet": {"WIDTH": 4, "IMAGE_SIZE": 8, "BATCHES": (2,)},
    "pages": {"SHAPE": {"heads": 4, "group_heads": 2, "keys": 1024, "dim": 16}},
    "decode": {
        "CACHED": 600,
        "BATCHES": (1, 2),
        "GROWTH": (300, 700),
        "ANSWERED": (256,),
        "TASKS": ("passkey",),
        "NUM_PROMPTS": 1,
        "LLAMA": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 97,
        },
    },
    "linear": {"IN": 64, "OUT": 48},
    "llama125m": {
        "LLAMA": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 97,
            "tie_word_embeddings": True,
        }
    },
    "packed": {"PROMPT": 8, "TOKENS": 2, "REPEATS": 1, "_compiled": lambda dense, ids: None},
    "select": {"SHAPES": {"statistical": (4, 256, 13), "topk": (4, 256, 5), "topk_long": (1, 512, 7)}},
    "dictionary": {
        "WIDTH": 32,
        "ATOMS": 64,
        "K": 4,
        "BATCH": 32,
        "ROWS": 8,
        "STEPS": 2,
        "LENGTH": 2,
        "HOOK": "residual.0",
        "SWEEP_K": (2, 4),
        "SWEEP_SIZES": (32, 64),
    },
    "codes": {"TOKENS": 8, "DICT_SIZE": 64, "DIM": 16, "K": 4},
    "spmm": {"CHANNELS": 16, "SIZE": 6},
    "prefill": {
        "CROSSOVER": (1024,),
        "LONG": (2048, 3072),
        "RANDOM": (64, 1024),
        "ANSWERED": (256,),
        "NUM_PROMPTS": 1,
        "KEPT": 0.0,
        "FINALISTS": 2,
        "RANDOM_LLAMA": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 16384,
        },
    },
}
ROWS = {
    "attention": {
        *(f"attention.{name}.{short}" for name in PATTERNS for short in ("bf16", "fp32")),
        *("attention.block10.flex", "attention.train10.bf16", "attention.decode5.bf16", "attention.decode100.bf16"),
    },
    "linear": {
        f"linear.{name}" for name in ("input50.fp32", "input50.bf16", "nm24.bf16", "bitmask50.bf16", "groups50.bf16")
    },
    "select": {"select.statistical", "select.topk", "select.topk_long"},
    "codes": {"codes.decode", "codes.train"},
    "spmm": {"spmm.conv1x1", "spmm.conv1x1_80"},
}


@pytest.fixture
def small(monkeypatch):
    """Every benchmark at a size that takes no time, on a machine of one operation and one byte a second."""
    for name, values in SMALL.items():
        for constant, value in values.items():
            monkeypatch.setattr(importlib.import_module(f"paucity.bench.{name}"), constant, value)
    monkeypatch.setattr(attention, "_flex", lambda inputs, pattern: lambda: time.sleep(1e-4))
    monkeypatch.setattr(machine, "arithmetic", lambda dtype: 1.0)
    monkeypatch.setattr(machine, "bandwidth", lambda: 1.0)


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_have_their_names_and_times(small, name):
    rows = run_bench(name)
    assert {row.bench for row in rows} == ROWS[name]
    for row in rows:
        assert row.seconds > 0
        assert row.baseline_seconds > 0
        assert 0 < row.limit_ratio < row.baseline_seconds  # a second for each of many operations or bytes


def test_a_model_with_sparse_activations_is_timed(small):
    (row,) = run_bench("activations")
    assert row.bench == "activations.teal50.decode"
    assert row.ratio > 0
    assert row.limit_ratio == 1  # layers so small multiply their zeros


def test_packed_weights_are_decoded_against_the_faster_dense_model(small):
    rows = run_bench("packed")
    assert [row.bench for row in rows] == ["packed.nm24", "packed.bitmask60"]
    assert {row.baseline for row in rows} == {"transformers, bfloat16, a token"}
    assert all(row.seconds > 0 and 1 < row.limit_ratio < 2.2 for row in rows)
    assert rows[0].limit_ratio < rows[1].limit_ratio


def test_the_best_prefill_is_one_that_answers_and_skips(small):
    found = {row.bench: row for row in run_bench("prefill")}
    named = {"prefill.2k", "prefill.3k", "prefill.2k.end_to_end", "prefill.selection_share"}
    assert {*named, "prefill.llama100m.64", "prefill.llama100m.1k.end_to_end"} <= set(found)
    assert {f"prefill.{name}.1024" for name in prefill.POLICIES} <= set(found)
    assert found["prefill.flash.1024"].limit_ratio == 1
    finalists = {name for name in found if name.endswith(".2048")}
    assert len(finalists) == 2
    assert found["prefill.2k"].ratio in {found[name].ratio for name in finalists}
    assert found["prefill.2k"].limit_ratio > 1
    assert found["prefill.selection_share"].ratio > 1


def test_the_best_chooses_within_its_share_of_the_time():
    times = Comparison({"dense": Timing((8.0,)), "slow": Timing((2.0,)), "fast": Timing((1.0,))})
    density = {"slow": 0.1, "fast": 0.1}
    assert prefill.best_of(prefill.Part(times, {"slow": 0.2, "fast": 0.2}, density)) == "slow"
    assert prefill.best_of(prefill.Part(times, {"slow": 0.2, "fast": 0.1}, density)) == "fast"
    assert prefill.best_of(prefill.Part(times, {"slow": 1.0, "fast": 0.2}, density)) == "fast"


def test_a_tenth_of_the_blocks_is_a_tenth():
    blocks = attention.tenth(3, 64)
    assert (blocks.sum((-1, -2)) == 208).all()  # of 2,080 causal ones
    assert blocks.diagonal(dim1=-2, dim2=-1).all()
    assert not blocks.triu(1).any()


def test_the_fastest_baseline_counts():
    waits = {"slow": lambda: time.sleep(4e-3), "fast": lambda: time.sleep(1e-3)}
    row = kernel_row("b", "s", lambda: None, waits, how="h", least_seconds=1e-4, repeats=3)
    assert row.baseline == "fast"
    assert row.limit_ratio == pytest.approx(row.baseline_seconds / 1e-4)


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "_DENSE", 64)
    monkeypatch.setattr(machine, "_READ_BYTES", 2**20)
    machine.arithmetic.cache_clear()
    machine.bandwidth.cache_clear()
    assert machine.least_seconds(flops=0, num_bytes=machine.bandwidth(), dtype=torch.float32) == 1
    three = machine.least_seconds(flops=3 * machine.arithmetic(torch.float32), num_bytes=0, dtype=torch.float32)
    assert three == pytest.approx(3)
    machine.arithmetic.cache_clear()
    machine.bandwidth.cache_clear()


PEER = """
import json, sys, time
job = json.loads(sys.argv[1])
assert job["who"] in ("saelens", "overcomplete")
assert job["what"] in ("step", "encode", "pursuit")
for line in sys.stdin:
    seconds = 90 if job["who"] == "saelens" or job["autocast"] else 60
    print("a line of a library", json.dumps({"seconds": seconds}), sep="\\n", flush=True)
"""


def test_dictionaries_take_turns_with_peers_in_their_own_processes(small, monkeypatch, tmp_path):
    (tmp_path / "peer.py").write_text(PEER)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/peer.py "$3"\n')
    python.chmod(0o755)
    sweeps = {"dictionary.sweep4", "dictionary.sweep4_at_hand", "dictionary.sweep4_sizes"}
    assert {row.bench for row in run_bench("dictionary")} == sweeps  # no peer is here
    monkeypatch.setenv("PAUCITY_SAELENS_PYTHON", str(python))
    rows = {row.bench: row for row in run_bench("dictionary")}
    assert set(rows) - sweeps == {
        f"dictionary.{name}" for name in ("topk_step", "topk_step_autocast", "encode", "mp_encode")
    }
    step = rows["dictionary.topk_step"]
    assert step.baseline.startswith("overcomplete, peak ")
    assert step.baseline_seconds == 60
    assert "SAELens 90.00 s" in step.size
    assert 0 < step.seconds < 60
    python.write_text("#!/bin/sh\necho 'no such library' >&2; exit 3\n")
    with pytest.raises(RuntimeError, match="exit status 3: no such library"):
        run_bench("dictionary")
