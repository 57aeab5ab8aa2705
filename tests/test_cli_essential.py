"""``paucity essential``."""

import json

import pytest
from typer.testing import CliRunner

from paucity.checks import InputError
from paucity.cli import app
from paucity.models.load import Loaded, byte_tokenizer


@pytest.fixture(autouse=True)
def _small(tiny_model, monkeypatch):
    """Every model is the tiny one, which guesses worse than chance and is measured all the same."""
    model = tiny_model("llama", vocab_size=300)
    monkeypatch.setattr("paucity.models.load.load", lambda source: Loaded(model, byte_tokenizer(300), source))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven eight nine ten\n" * 4)
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, ["essential", *arguments])


def test_a_table_and_a_file(text, tmp_path):
    out = tmp_path / "curves.json"
    result = run("tiny", "--text", text, "--max-tokens", "32", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "unstructured" in result.output
    assert "n:8" in result.output
    found = json.loads(out.read_text())
    assert [(row["pattern"], row["order"]) for row in found["curves"]] == [
        ("unstructured", "magnitude"), ("unstructured", "random"), ("n:8", "magnitude"), ("n:8", "random")
    ]  # fmt: skip
    assert [len(row["points"]) for row in found["curves"]] == [20, 20, 8, 8]


def test_json_of_one_pattern_without_the_control(text):
    arguments = ("--pattern", "nm", "--m", "4", "--no-control", "--json", "--max-tokens", "32")
    found = json.loads(run("tiny", "--text", text, *arguments).stdout)
    assert found["model"] == "tiny"
    (row,) = found["curves"]
    assert [point["pattern"] for point in row["points"]] == ["dense", "3:4", "2:4", "1:4"]
    assert row["knee"] is None  # four points lie on many broken lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pattern", "2:4"), "--pattern must be one of nm, unstructured, got 2:4"),
        (("--drop", "0"), r"--drop must be in \(0, 1\)"),
        (("--m", "5"), "m must divide the input size of"),
        (("--text", "absent.txt"), "measured text must be python, held_out_python or a file that exists"),
        (("--out", "no/such/folder.json"), "--out must be in a folder that exists"),
    ],
)
def test_bad_input(text, arguments, message):
    given = arguments if "--text" in arguments else ("--text", text, *arguments)
    with pytest.raises(InputError, match=message):
        raise run("tiny", "--max-tokens", "32", *given).exception


def test_a_short_context_is_measured_in_windows_of_it(text, tiny_model, monkeypatch):
    model = tiny_model("llama", vocab_size=300)
    model.config.max_position_embeddings = 64
    monkeypatch.setattr("paucity.models.load.load", lambda source: Loaded(model, byte_tokenizer(300), source))
    result = run("tiny", "--text", text, "--pattern", "nm", "--m", "2", "--no-control", "--max-tokens", "90")
    assert result.exit_code == 0, result.output
