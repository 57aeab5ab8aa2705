"""``paucity dictionary`` on a tiny model with a byte tokenizer, from the shell to the folder."""

import json

import pytest
from typer.testing import CliRunner

from paucity.checks import InputError
from paucity.cli import app
from paucity.dictionary import to_folder
from paucity.models.load import Loaded, byte_tokenizer


@pytest.fixture
def paucity(tiny_model, monkeypatch, tmp_path):
    model = tiny_model("llama", vocab_size=300)
    monkeypatch.setattr(to_folder, "load", lambda source: Loaded(model, byte_tokenizer(300), source))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)

    def run(*words, fails=None):
        found = CliRunner().invoke(app, ["dictionary", *map(str, words)])
        if fails is None:
            assert found.exit_code == 0, found.output + repr(found.exception)
            return found.stdout
        if fails is KeyboardInterrupt:
            return None if found.exit_code else pytest.fail("nothing was killed")
        assert isinstance(found.exception, InputError)
        assert fails in str(found.exception)
        return None

    run.train = lambda *words, **options: run(
        *("train", "--text", text, "--eval-text", text, "--length", 32, "--dict-size", 40, "--k", 4),
        *("--num-tokens", 2048, "--batch-size", 256, "--out", tmp_path / "out", *words),
        **options,
    )
    return run


def test_train_eval_info(paucity, tmp_path):
    record = json.loads(paucity.train("--hook", "residual.1", "--hook", "heads.0", "--json"))
    names = [one["name"] for one in record["dictionaries"]]
    assert names == ["residual.1", "heads.0"]
    for one in record["dictionaries"]:
        metrics = one["metrics"]
        assert metrics["fvu"] == pytest.approx(1 - metrics["explained_variance"])
        assert 0 < metrics["l0"] <= 4
        assert 0 <= metrics["dead"] <= 1
        assert metrics["ce_loss_score"] <= 1.001
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["heads.0", "residual.1", "training.json"]
    assert not (tmp_path / "out.partial").exists()
    shown = paucity("info", tmp_path / "out")
    assert "residual.1" in shown
    assert "FVU" in shown
    again = json.loads(
        paucity("eval", tmp_path / "out" / "residual.1", "--text", tmp_path / "text.txt", "--length", 32, "--json")
    )
    assert again["dictionaries"][0]["metrics"] == record["dictionaries"][0]["metrics"]


def test_a_killed_training_goes_on(paucity, tmp_path, monkeypatch):
    whole = json.loads(paucity.train("--hook", "residual.1", "--json"))
    fit_on = to_folder.fit_on

    def killed(*args, **options):
        fit_on(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(to_folder, "fit_on", killed)
        paucity.train("--hook", "residual.1", "--out", tmp_path / "other", fails=KeyboardInterrupt)
    assert not (tmp_path / "other").exists()
    paucity.train(
        "--hook", "residual.1", "--out", tmp_path / "other", fails="hold no unfinished run (--resume continues"
    )
    paucity.train("--hook", "residual.0", "--out", tmp_path / "other", "--resume", fails="run of the same plan")
    resumed = json.loads(paucity.train("--hook", "residual.1", "--out", tmp_path / "other", "--resume", "--json"))
    assert resumed["dictionaries"][0]["metrics"] == whole["dictionaries"][0]["metrics"]


def test_what_is_refused(paucity, tmp_path):
    paucity.train("--hook", "residul.1", fails="hook must be the name of a place in the model")
    paucity.train("--method", "topk", fails="did you mean 'topk_sae'?")
    paucity.train("--k", 64, fails="k must be in [1, 40], got 64")
    paucity.train("--learning-rate", 0, fails="learning_rate must be greater than 0")
    (tmp_path / "out").mkdir()
    paucity.train(fails="out must not exist (--force replaces it")
    paucity("info", tmp_path / "none", fails="source must be a folder with a dictionary")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]
