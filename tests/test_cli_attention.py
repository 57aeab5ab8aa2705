"""`paucity attention`, through the command line, on a tiny model in a folder."""

import json

import pytest
from typer.testing import CliRunner

from paucity.attention import SinkWindow, load_policy, save_policy
from paucity.checks import InputError
from paucity.cli import app


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A model with random weights and no tokenizer: bytes are its tokens."""
    path = tmp_path / "model"
    tiny_model("llama", vocab_size=300).save_pretrained(path)
    (tmp_path / "text.py").write_text("def f(x):\n    return x\n" * 40)
    return path


def run(*arguments):
    result = CliRunner().invoke(app, ["attention", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_observe_tells_of_every_layer_and_head(folder, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("method: sink_window\nwindow_size: 10\nnum_sinks: 2\n")
    options = ("--model", folder, "--text", tmp_path / "text.py", "--tokens", 100)
    rows = json.loads(run("observe", policy, *options, "--json"))
    assert [row["layer"] for row in rows] == [0, 1]
    kept = sum(min(i + 1, 10) + min(max(0, i - 9), 2) for i in range(100)) / (100 * 101 / 2)
    assert rows[0]["density"] == pytest.approx([kept] * 4)
    assert all(0 < value < 1 for value in rows[1]["recall"])
    assert "recall" in run("observe", "sink_window", *options)


def test_crossover_halves_the_longest_prompt(folder, tmp_path):
    options = ("--model", folder, "--text", tmp_path / "text.py", "--longest", 128)
    found = json.loads(run("crossover", "sink_window", *options, "--json"))
    assert [row["tokens"] for row in found["lengths"]] == [4, 8, 16, 32, 64, 128]
    assert found["crossover"] in (None, 4, 8, 16, 32, 64, 128)
    assert "Faster than dense attention" in run("crossover", "sink_window", *options)


def test_speculate_writes_what_the_dense_model_does(folder, tmp_path):
    options = ("--model", folder, "--text", tmp_path / "text.py", "--prompt", 100, "--tokens", 12)
    found = json.loads(run("speculate", "oracle_topk", *options, "--num-draft", 3, "--json"))
    assert found["same_as_dense"] is True
    assert 1 <= found["tokens_per_pass"] <= 4
    assert 0 <= found["accepted"] <= 1
    assert "same as dense: True" in run("speculate", "oracle_topk", *options)
    with pytest.raises(InputError, match="draft must be a policy of decode steps, got sink_window"):
        run("speculate", "sink_window", *options)


def test_heads_are_listed_by_score(folder, tmp_path):
    (tmp_path / "text.py").write_text("def f(x):\n    return x\n" * 160)
    options = ("--model", folder, "--text", tmp_path / "text.py", "--longest", 3300, "--depths", 1)
    rows = json.loads(run("heads", *options, "--json"))
    assert sorted((row["layer"], row["head"]) for row in rows) == [(i, j) for i in range(2) for j in range(4)]
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert "of the 8 heads score above 0.1" in run("heads", *options)


def test_what_is_wrong_is_said_before_any_work(folder, tmp_path):
    options = ("--model", folder, "--text", tmp_path / "text.py")
    with pytest.raises(InputError, match="text must have at least 5000 tokens"):
        run("observe", "sink_window", *options, "--tokens", 5000)
    with pytest.raises(InputError, match="did you mean 'sink_window'"):
        run("observe", "sink_windo", *options)
    with pytest.raises(InputError, match="which does not exist"):
        run("observe", tmp_path / "none.json", *options)
    taken = tmp_path / "taken.json"
    save_policy(SinkWindow(), taken)
    with pytest.raises(InputError, match="--out must not exist"):
        run("search", "sink_window", "--out", taken, *options)
    with pytest.raises(InputError, match="method must be a search, not a policy, got sink_window"):
        run("search", "sink_window", "--out", tmp_path / "new.json", *options)
    assert load_policy(taken) == SinkWindow()
