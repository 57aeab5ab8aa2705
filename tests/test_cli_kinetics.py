"""``paucity kinetics`` and ``paucity info --measure``."""

import json

import pytest
from typer.testing import CliRunner

from paucity.checks import InputError
from paucity.cli import app
from paucity.measure.machine import Machine, Rates


@pytest.fixture
def saved(tmp_path):
    rates = Rates(
        products={1: 2e10, 1024: 4e11}, prefill_attention={1024: 1e11}, decode_bytes={1: 2e10},
        listed_bytes=2e10, moved_bytes=1e11, layer_seconds=1e-4, forward_seconds=1e-4,
    )  # fmt: skip
    machine = Machine(name="x", device="cpu", threads=2, bandwidth=3e10, call_seconds=1e-6, rates={"bfloat16": rates})
    machine.save(tmp_path / "machine.json")
    return str(tmp_path / "machine.json")


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_a_table_and_a_recommendation(saved):
    arguments = ["kinetics", "--model", "embedded", "--prompt", "6000", "--generate", "100", "--batch", "8"]
    result = run(*arguments, "--machine", saved, "--budget", "512", "--budget", "64")
    assert result.exit_code == 0, result.output
    assert "block_topk" in result.output
    assert "Take embedded, block_topk with 512 keys." in result.output
    assert "dense attention takes most of a step from" in result.output


def test_json(saved):
    arguments = ["--prompt", "6000", "--generate", "100", "--method", "window", "--method", "quest", "--budget", "64"]
    result = run("kinetics", "--model", "embedded", *arguments, "--machine", saved, "--max-seconds", "1e-9", "--json")
    found = json.loads(result.stdout)
    assert [row["method"] for row in found["plans"]] == ["dense", "window", "quest"]
    assert found["recommended"] in found["plans"]
    assert "Nothing fits" in found["reasons"][0]
    assert found["machine"] == Machine.load(saved).model_dump(mode="json")


def test_the_machine_is_measured_printed_and_saved(small_probes, tmp_path):
    target = tmp_path / "machine.json"
    result = run("info", "--measure", "--out", str(target))
    assert result.exit_code == 0, result.output
    assert "memory, GB/s read" in result.output
    assert set(Machine.load(target).rates) == {"bfloat16", "float32"}
    found = json.loads(run("info", "--measure", "--json").stdout)
    assert found["torch"]
    assert found["machine"]["bandwidth"] > 0
    assert "machine" not in json.loads(run("info", "--json").stdout)


BAD = [
    (["--prompt", "9000"], "must fit the 8192 tokens of embedded"),
    (["--method", "quests"], "did you mean 'quest'"),
    (["--machine", "absent.json"], "path must be a file of"),
    (["--dtype", "float64"], "dtype must be one of"),
    (["--dtype", "float32"], "dtype must be one of bfloat16, got float32"),
    (["--max-seconds", "0"], "--max-seconds must be in"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input(saved, arguments, message):
    given = arguments if "--machine" in arguments else [*arguments, "--machine", saved]
    result = run("kinetics", "--model", "embedded", *given)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_out_without_measuring(tmp_path):
    result = run("info", "--out", str(tmp_path / "x.json"))
    assert "--out must come with --measure" in str(result.exception)


@pytest.mark.parametrize("where", ["file", "folder", "absent"])
def test_a_target_that_cannot_be_written_is_refused_before_measuring(monkeypatch, tmp_path, where):
    monkeypatch.setattr("paucity.cli.measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("mine")
    target, message = {
        "file": (tmp_path / "file", "--out must not exist"),
        "folder": (tmp_path, "--out must be a file"),
        "absent": (tmp_path / "no/file", "--out must be in a folder that exists"),
    }[where]
    result = run("info", "--measure", "--out", str(target))
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert (tmp_path / "file").read_text() == "mine"


def test_force_replaces_the_target(small_probes, tmp_path):
    (tmp_path / "file").write_text("old")
    assert run("info", "--measure", "--out", str(tmp_path / "file"), "--force").exit_code == 0
    assert Machine.load(tmp_path / "file").bandwidth > 0


def test_a_budget_that_leaves_no_key_out_is_told(saved):
    arguments = ["kinetics", "--model", "embedded", "--prompt", "2000", "--generate", "100", "--machine", saved]
    result = run(*arguments, "--budget", "9000", "--budget", "64", "--json")
    assert "A budget of 9,000 keys leaves none of the 2,100 tokens out" in result.stderr
    assert "64 keys" not in result.stderr
    assert json.loads(result.stdout)["plans"]
