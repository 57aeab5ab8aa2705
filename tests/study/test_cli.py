"""`paucity study attention`, through the command line, on a tiny model in a folder."""

import json

import pytest
from typer.testing import CliRunner

from paucity.checks import InputError
from paucity.cli import app


@pytest.fixture
def options(loaded, study, tmp_path):
    loaded.model.save_pretrained(tmp_path / "model")
    small = study().model_copy(update={"model": str(tmp_path / "model")})
    (tmp_path / "small.yaml").write_text(small.to_yaml())
    return (tmp_path / "small.yaml", "--out", tmp_path / "out")


def call(*arguments):
    result = CliRunner().invoke(app, ["study", "attention", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_a_study_prints_its_rows_and_writes_its_page(options, tmp_path):
    printed = call(*options, "--methods", "sink_window", "--phases", "prefill", "--budgets", "0.25", "--prompts", 1)
    assert "sink_window" in printed
    assert "Prefill, 400 tokens" in printed
    assert (tmp_path / "out/study.html").is_file()
    found = json.loads(call(*options, "--tasks", "copying", "--force", "--json"))
    assert {row["task"] for row in found["rows"]} == {"copying"}
    assert {row["method"] for row in found["rows"]} == {"dense", "sink_window", "knorm"}


def test_options_without_a_file(options, tmp_path):
    plain = ("--model", tmp_path / "model", "--text", tmp_path / "text.py", "--out", tmp_path / "out")
    some = ("--quick", "--methods", "knorm", "--tasks", "passkey", "--lengths", "200", "--prompts", "1", "--seeds", "1")
    found = json.loads(call(*plain, *some, "--json"))
    assert {row["phase"] for row in found["rows"]} == {"decode"}
    assert found["plan"]["lengths"] == [200]


def test_what_is_wrong_is_said_before_any_work(options):
    for wrong, message in (
        (("--methods", "quist"), "method must be one of"),
        (("--budgets", "many"), "--budgets must be numbers separated by commas, got many"),
        (("--tasks", "passkeys"), "tasks"),
        (("--phases", "both"), "phases"),
        (("--workers", "2"), "without --ray"),
    ):
        with pytest.raises(InputError, match=message):
            call(*options, *wrong)


def test_quick_and_a_plan_of_its_own_exclude_each_other(options):
    with pytest.raises(InputError, match="--quick must be left out with a plan"):
        call(*options, "--quick")
