"""A dictionary in a recipe: the report says what it costs, it is written beside the model, a killed run goes on."""

import heapq
import textwrap

import pytest

from paucity import pipeline
from paucity.dictionary.files import load_dictionary, read_facts
from paucity.pipeline import run
from paucity.recipe import Recipe

SETTINGS = {
    "calibration": {"num_samples": 10, "length": 64, "text": heapq.__file__},
    "measure": {
        "text": textwrap.__file__,
        "length": 128,
        "stride": 64,
        "max_tokens": 256,
        "retrieval": {"tasks": ["passkey"], "lengths": [200], "num_prompts": 1},
        "prefill_tokens": 64,
        "decode_tokens": 2,
        "repeats": 1,
    },
}
STEP = {
    "method": "topk_sae",
    "hooks": ["residual.1"],
    "dict_size": [48],
    "k": [4],
    "num_tokens": 1024,
    "batch_size": 128,
}


def test_a_recipe_trains_and_reports(tiny_model, tmp_path, monkeypatch):
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "model")
    recipe = Recipe.build(model=str(tmp_path / "model"), steps=[STEP], **SETTINGS)
    render = pipeline.render

    def killed(report):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "render", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out")
    monkeypatch.setattr(pipeline, "render", render)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").rglob("shard-*.safetensors")}
    assert len(before) == 1
    seen = []
    report = run(recipe, tmp_path / "out", resume=True, on_progress=seen.append)
    assert not any("residual.1: FVU" in line for line in seen)  # the training was done
    assert report.sparse.density == {"residual.1": pytest.approx(4 / 48, rel=0.5)}
    assert report.sparse.bits_per_byte != report.dense.bits_per_byte
    assert "residual.1: FVU" in report.steps[0].notes[1]
    folder = tmp_path / "out" / "dictionaries" / "residual.1"
    assert load_dictionary(folder).dict_size == 48
    assert read_facts(folder)["hook"] == "residual.1"
