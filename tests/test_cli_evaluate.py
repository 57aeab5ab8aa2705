"""``paucity evaluate`` on tiny models and short lists of what is asked."""

import json
import textwrap

import pytest
from typer.testing import CliRunner

from paucity.checks import InputError
from paucity.cli import app

ASKED = [{"prompt": f"def f{i}(", "answer": "x", "choices": ["x", "yy", "z"], "context": "f(x)"} for i in range(6)]


@pytest.fixture
def call(tiny_model, tmp_path):
    for seed, name in enumerate(("dense", "sparse")):
        __import__("torch").manual_seed(seed)
        tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / name)
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in ASKED))

    def run(*arguments):
        tasks = [part for task in ("agreement", "knowledge", "open_book") for part in ("--tasks", task)]
        files = ["--questions", str(tmp_path / "asked.jsonl"), "--text", textwrap.__file__, "--quick"]
        return CliRunner().invoke(app, ["evaluate", str(tmp_path / "sparse"), *tasks, *files, *arguments])

    return run


def test_dense_stands_beside_sparse(call, tmp_path):
    shown = call("--against", str(tmp_path / "dense"))
    assert shown.exit_code == 0, shown.exception
    assert "Knowledge, by choice" in shown.stdout
    assert "change" in shown.stdout
    found = json.loads(call("--against", str(tmp_path / "dense"), "--json").stdout)
    by_name = {ability["name"]: ability for ability in found["abilities"]}
    assert by_name["knowledge"]["num"] == 6
    assert by_name["perplexity"]["dense"]["value"] > 0
    assert by_name["perplexity"]["change"]["low"] is not None


def test_one_model_alone(call):
    found = json.loads(call("--json").stdout)
    assert {ability["dense"] for ability in found["abilities"]} == {None}
    assert [ability["name"] for ability in found["abilities"]] == ["perplexity", "loss", "knowledge", "open_book"]
    assert "Perplexity" in call().stdout


def test_what_is_wrong_is_refused(call, tmp_path):
    with pytest.raises(InputError, match="task must be one of"):
        raise call("--tasks", "knowlege").exception
    with pytest.raises(InputError, match="JSON Lines file that exists"):
        raise call("--questions", "absent.jsonl").exception
    with pytest.raises(InputError, match="--against must have the tokenizer"):
        raise call("--against", "embedded").exception
