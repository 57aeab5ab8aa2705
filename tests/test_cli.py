"""The command: exit codes, one-line errors, JSON contracts, and that it starts at once."""

import heapq
import json
import os
import subprocess
import sys
import textwrap

import pytest
import typer
import yaml
from typer.testing import CliRunner

from paucity.catalog import METHODS
from paucity.claims import CLAIMS
from paucity.cli import app, main


def paucity(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paucity", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)


def test_catalog_json_is_the_contract():
    result = paucity("catalog", "--json")
    rows = json.loads(result.stdout)
    assert result.returncode == 0
    assert [row["name"] for row in rows] == sorted(METHODS)
    assert set(rows[0]) == {"name", "family", "paper", "title", "operators", "claims"}


def test_info_says_what_is_active():
    facts = json.loads(paucity("info", "--json", PAUCITY_KERNELS="reference").stdout)
    assert facts["torch"]
    assert facts["kernels"]["requested"] == "reference"


def test_claims_list_names_every_claim():
    assert {row["claim"] for row in json.loads(paucity("claims", "list", "--json").stdout)} == set(CLAIMS)


BAD = [
    (["run", "absent.yaml"], "does not exist"),
    (["catalog", "--family", "wieghts"], "did you mean 'weights'"),
    (["claims", "run", "wanda"], "must be one of"),
    (["bench", "nothing"], "must be one of"),
    (["run"], "Missing argument"),
    (["info", "--colour"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_message_and_exit_code_2(arguments, message):
    result = paucity(*arguments)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_kernels_variable_is_checked():
    result = paucity("info", PAUCITY_KERNELS="fast")
    assert (result.returncode, result.stdout) == (2, "")
    assert "must be one of auto, native, reference, triton" in result.stderr


def test_a_bad_recipe_is_one_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"steps": [{"method": "wanda", "sparsity": 1.5}]}))
    result = paucity("run", str(recipe), "--out", str(tmp_path / "out"))
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "sparsity must be in [0, 1), got 1.5" in result.stderr


def test_run_on_a_folder_prints_the_table_and_the_path(tiny_model, tmp_path):
    tiny_model("qwen3", vocab_size=300).save_pretrained(tmp_path / "model")
    measure = {"length": 64, "stride": 32, "max_tokens": 128, "prefill_tokens": 64, "decode_tokens": 2, "repeats": 1}
    retrieval = {"tasks": ["passkey"], "lengths": [256], "num_prompts": 1}
    measure |= {"retrieval": retrieval, "text": textwrap.__file__}
    recipe = {
        "calibration": {"text": heapq.__file__},
        "measure": measure,
        "steps": [{"method": "magnitude", "sparsity": 0.5}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["run", str(tmp_path / "recipe.yaml"), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "o")]
    result = paucity(*arguments)
    assert result.returncode == 0, result.stderr
    assert "Bits per byte" in result.stdout
    assert str(tmp_path / "o" / "report.html") in result.stdout
    again = paucity(*arguments)
    assert again.returncode == 2
    assert "--force" in again.stderr


def commands(group, path=()):
    for name, command in group.commands.items():
        yield from commands(command, (*path, name)) if hasattr(command, "commands") else [((*path, name), command)]


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_shows_every_text_whole(path):
    shown = "".join(CliRunner().invoke(app, [*path, "--help"]).output.split())
    for parameter in COMMANDS[path].params:
        text = getattr(parameter, "help", None) or ""
        assert "".join(text.split()) in shown


@pytest.mark.parametrize(
    ("arguments", "goes_on"), [(["run", "x"], True), (["study", "attention"], True), (["bench"], False)]
)
def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys, arguments, goes_on):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("paucity.cli.app", interrupted)
    monkeypatch.setattr(sys, "argv", ["paucity", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    said = " ".join(capsys.readouterr().err.split())
    assert said == "paucity: interrupted" + ("; the same command with --resume goes on." if goes_on else ".")
