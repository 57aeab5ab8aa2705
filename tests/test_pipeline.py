"""The main job on small models: what it writes, that it resumes, and that nothing of the user's is lost."""

import heapq
import json
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from paucity.checks import InputError
from paucity.folder import Folder
from paucity.pipeline import run
from paucity.recipe import Recipe
from paucity.report import Report

MEASURED = ("bits_per_byte", "passkey_accuracy", "prefill_ms", "decode_ms_per_token", "peak_memory_mb", "flops")
SMALL = {
    "calibration": {"num_samples": 2, "length": 64, "text": heapq.__file__},
    "measure": {
        "text": textwrap.__file__,
        "length": 128,
        "stride": 64,
        "max_tokens": 512,
        "retrieval": {"tasks": ["passkey"], "lengths": [256], "num_prompts": 2},
        "prefill_tokens": 128,
        "decode_tokens": 2,
        "repeats": 2,
    },
}
STEPS = [
    {"method": "wanda", "sparsity": 0.5},
    {"method": "vertical_slash", "min_length": 64, "vertical_share": 0.1, "slash_share": 0.1, "q_block": 16},
]


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A function that saves a tiny model, without a tokenizer, and gives its folder."""

    def save(architecture: str) -> str:
        target = tmp_path / f"model-{architecture}"
        tiny_model(architecture, vocab_size=300).save_pretrained(target)
        return str(target)

    return save


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "mixtral"])
def test_the_same_recipe_runs_on_every_architecture(folder, tmp_path, kind):
    recipe = Recipe.build(model=folder(kind), steps=STEPS, **SMALL)
    run(recipe, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for side in ("dense", "sparse"):
        assert all(report[side][name] is not None for name in MEASURED)
    assert set(report["dense"]["density"].values()) == {1.0}
    weights = [value for site, value in report["sparse"]["density"].items() if site.endswith("weight")]
    attention = [value for site, value in report["sparse"]["density"].items() if site.endswith("attention")]
    assert sum(weights) / len(weights) == pytest.approx(0.5, abs=0.02)
    assert len(attention) == 2
    assert all(0 < value < 1 for value in attention)
    assert len(report["head_density"]) == 2
    assert report["sparse"]["flops"] > 0
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == recipe
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    zeros = [float((p == 0).float().mean()) for n, p in sparse.named_parameters() if n in report["sparse"]["density"]]
    assert zeros
    assert zeros == pytest.approx([0.5] * len(zeros), abs=0.02)


def test_lengths_are_cut_to_the_context_and_the_report_says_so(folder, tmp_path):
    settings = SMALL | {"measure": SMALL["measure"] | {"prefill_tokens": 4096, "length": 4096}}
    report = run(Recipe.build(model=folder("llama"), steps=STEPS[:1], **settings), tmp_path / "out")
    assert report.dense.prefill_tokens == 256
    assert any("cut to the model's context of 256 tokens" in note for note in report.model.notes)


def test_a_killed_run_resumes_where_it_was(folder, tmp_path, monkeypatch):
    recipe = Recipe.build(model=folder("llama"), steps=STEPS, **SMALL)
    whole = run(recipe, tmp_path / "whole")
    once, calls = Folder.once, []

    def dies(self, name, make):
        if name == "sparse.quality":
            raise KeyboardInterrupt
        return once(self, name, make)

    def counts(self, name, make):
        return once(self, name, lambda: calls.append(name) or make())

    monkeypatch.setattr(Folder, "once", dies)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out")
    monkeypatch.setattr(Folder, "once", counts)
    with pytest.raises(InputError, match=r"hold no unfinished run .*--resume"):
        run(recipe, tmp_path / "out")
    with pytest.raises(InputError, match="continue a run of the same plan"):
        run(recipe.model_copy(update={"seed": 1}), tmp_path / "out", resume=True)
    report = run(recipe, tmp_path / "out", resume=True)
    assert "sparse.quality" in calls
    assert "dense.quality" not in calls
    assert report.sparse.bits_per_byte == whole.sparse.bits_per_byte
    assert not (tmp_path / "out.partial").exists()


def test_abilities_stand_beside_perplexity_and_resume(folder, tmp_path, monkeypatch):
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "def f(", "answer": "x", "choices": ["x", "y"]}\n' * 8)
    kick = {"tasks": ["agreement", "knowledge"], "questions": str(asked), "max_tokens": 200}
    recipe = Recipe.build(
        model=folder("llama"), steps=STEPS[:1], **SMALL | {"measure": SMALL["measure"] | {"kick": kick}}
    )
    once, made = Folder.once, []

    def dies(self, name, make):
        if name == "sparse.kick.knowledge":
            raise KeyboardInterrupt
        return once(self, name, make)

    monkeypatch.setattr(Folder, "once", dies)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out")
    monkeypatch.setattr(Folder, "once", lambda self, n, make: once(self, n, lambda: made.append(n) or make()))
    report = run(recipe, tmp_path / "out", resume=True)
    assert made == ["sparse.kick.knowledge"]
    assert [ability.name for ability in report.abilities][-1] == "knowledge"
    assert "What perplexity hides" in (tmp_path / "out" / "report.html").read_text()
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == recipe


def test_an_existing_folder_is_kept_until_the_new_one_is_complete(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    recipe = Recipe.build(model=folder("llama"), steps=STEPS[:1], **SMALL)
    with pytest.raises(InputError, match=r"out must not exist \(--force"):
        run(recipe, out)
    monkeypatch.setattr("paucity.pipeline.render", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(recipe, out, force=True)
    assert (out / "mine.txt").read_text() == "precious"
    monkeypatch.undo()
    run(recipe, out, force=True)
    assert (out / "report.json").is_file()
    assert not (out / "mine.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model-llama", "out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [{"method": "wanda", "sparsity": 0.5, "sites": ["experts"]}]}, "experts"),
        ({"steps": [{"method": "wanda", "n": 2, "m": 7}]}, "must divide"),
        ({"steps": [{"method": "cats", "sparsity": 0.5}]}, "gate"),
        ({"model": "absent/folder/here"}, "source must"),
        ({"measure": SMALL["measure"] | {"text": "absent.txt"}}, "text must be python, held_out_python or a file"),
        ({"measure": SMALL["measure"] | {"retrieval": {"lengths": [8]}}}, "length must be at least"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(folder, tmp_path, change, message):
    recipe = Recipe.build(**({"model": folder("gpt2"), "steps": STEPS} | SMALL | change))
    with pytest.raises(InputError, match=message):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_an_empty_text_is_refused(folder, tmp_path):
    text = tmp_path / "empty.txt"
    text.write_text(" \n")
    recipe = Recipe.build(model=folder("llama"), steps=STEPS, **SMALL).using(text=str(text))
    with pytest.raises(InputError, match="hold more than white space"):
        run(recipe, tmp_path / "out")


def test_the_dense_model_is_never_touched(folder, tmp_path):
    source = folder("llama")
    before = AutoModelForCausalLM.from_pretrained(source).state_dict()
    run(Recipe.build(model=source, steps=STEPS, **SMALL), tmp_path / "out")
    after = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_real_pretrained_llama_on_stories(stories260k, tmp_path):
    from paucity.measure.data import tiny_stories

    text, calibration = tmp_path / "stories.txt", tmp_path / "calibration.txt"
    text.write_text("\n".join(tiny_stories()[:20]))
    calibration.write_text("\n".join(tiny_stories()[100:140]))
    mild = [{"method": "wanda", "sparsity": 0.2}, {"method": "sink_window", "min_length": 64, "window_size": 64}]
    recipe = Recipe.build(model=str(stories260k), steps=mild, **SMALL)
    report = run(recipe.using(text=str(text), calibration_text=str(calibration)), tmp_path / "out")
    assert report.dense.perplexity < 6
    assert report.dense.bits_per_byte < report.sparse.bits_per_byte < 1.2 * report.dense.bits_per_byte
    assert Path(tmp_path / "out" / "model" / "config.json").is_file()


def test_a_run_killed_while_it_prunes_goes_on_at_the_site_where_it_was(tmp_path):
    solved = []

    def kill(line):
        solved.append(line)
        if line.startswith("wanda: 20 of 35"):
            raise KeyboardInterrupt

    steps = [{"method": "wanda", "sparsity": 0.3}]
    recipe = Recipe.build(steps=steps, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out", on_progress=kill)
    assert len(list((tmp_path / "out.partial").rglob("*.weight.safetensors"))) == 20
    solved.clear()
    run(recipe, tmp_path / "out", resume=True, on_progress=solved.append)
    assert solved[2].startswith("wanda: 20 of 35 weights, about")
    whole = run(recipe, tmp_path / "whole")
    assert whole.sparse.bits_per_byte == Report.read(tmp_path / "out" / "report.json").sparse.bits_per_byte
    assert not (tmp_path / "out.partial").exists()


def test_a_step_that_does_not_fit_leaves_nothing_behind(tmp_path):
    recipe = Recipe.build(steps=[{"method": "magnitude", "n": 2, "m": 5}], **SMALL)
    with pytest.raises(InputError, match="m must divide"):
        run(recipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())
