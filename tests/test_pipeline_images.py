"""Recipes of image models: what a run writes, that it resumes, and what is refused before any training."""

import json

import pytest
import torch

from paucity.checks import InputError
from paucity.measure.images import SETS
from paucity.models.vision import ConvNet, load_classifier
from paucity.pipeline import run
from paucity.recipe import Recipe
from paucity.report import Report, console_table
from paucity.weights.apply import apply_step, options_for

pytest.importorskip("sklearn")
DIGITS = {"name": "digits", "train_limit": 256, "test_limit": 80, "batch_sizes": [1, 4], "repeats": 2}
TRAINING = {"arguments": {"width": 4, "depth": 3}, "epochs": 2, "batch_size": 32, "finetune_epochs": 1, "min_steps": 0}
GRADUAL = {"method": "gradual", "sparsity": 0.8, "epochs": 1}


def recipe(steps=(GRADUAL,), **fields):
    return Recipe.build(**({"model": "convnet", "images": DIGITS, "training": TRAINING, "steps": list(steps)} | fields))


def test_a_run_writes_a_report_and_a_model_that_loads(tmp_path):
    report = run(recipe(), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model",
        "recipe.yaml",
        "report.html",
        "report.json",
    ]
    read = Report.read(tmp_path / "out" / "report.json")
    assert read.sparse.images.num_images == 80
    assert [entry.batch for entry in read.dense.images.times] == [1, 4]
    assert set(report.sparse.density) == {f"blocks.{i}.pointwise.weight" for i in range(3)}
    assert list(report.sparse.density.values()) == pytest.approx([0.2] * 3, abs=0.02)
    assert report.steps[0].density == pytest.approx(0.2, abs=0.02)
    assert read.sparse.images.num_nonzero < read.dense.images.num_nonzero
    assert read.sparse.images.flops <= read.dense.images.flops
    model = load_classifier(tmp_path / "out" / "model")
    assert float((model.blocks[0].pointwise.weight == 0).float().mean()) == pytest.approx(0.8, abs=0.02)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Accuracy, 80 images" in page
    assert "Bits per byte" not in page
    assert console_table(report).row_count == 9
    assert "accuracy within 1 point" in report.verdict[0]
    again = run(
        recipe(model=str(tmp_path / "out" / "model"), steps=[{"method": "magnitude", "sites": ["pointwise"]}]),
        tmp_path / "two",
    )
    assert "as it is" in again.model.notes[0]


@pytest.mark.parametrize(
    ("model", "step"),
    [
        ("convnet", {"method": "wanda", "sites": ["pointwise"]}),
        ("convnet", {"method": "kernel_groups", "group_size": 4}),
        ("vit", {"method": "magnitude", "n": 2, "m": 4}),
        ("vit", {"method": "channels"}),
    ],
)
def test_one_shot_steps_are_trained_with_their_zeros_held(tmp_path, model, step):
    arguments = {"width": 4, "depth": 3} if model == "convnet" else {"dim": 8, "depth": 1, "heads": 2}
    training = TRAINING | {"arguments": arguments, "distil": True}
    report = run(recipe([step], model=model, training=training), tmp_path / "out")
    assert list(report.sparse.density.values()) == pytest.approx([0.5] * len(report.sparse.density), abs=0.05)
    if step["method"] == "kernel_groups":
        assert "rearranged" in report.steps[0].notes[0]


@pytest.mark.parametrize("step", [GRADUAL, {"method": "channels"}])
@pytest.mark.parametrize("at", ["measuring", "publishing"])
def test_a_killed_run_resumes_with_what_was_trained(tmp_path, monkeypatch, step, at):
    from paucity import pipeline_images

    def killed(*_):
        raise KeyboardInterrupt

    whole = run(recipe([step]), tmp_path / "whole")
    if at == "measuring":
        monkeypatch.setattr(pipeline_images, "measure_images", killed)
    else:
        monkeypatch.setattr(pipeline_images.Folder, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe([step]), tmp_path / "out")
    with pytest.raises(InputError, match="hold no unfinished run"):
        run(recipe([step]), tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(pipeline_images, "train", killed)
    monkeypatch.setattr(pipeline_images, "train_sparse", killed)
    resumed = run(recipe([step]), tmp_path / "out", resume=True)
    assert resumed.dense.images.accuracy == whole.dense.images.accuracy
    assert resumed.sparse.images.accuracy == whole.sparse.images.accuracy
    assert resumed.steps[0].density == whole.steps[0].density
    assert not (tmp_path / "out.partial").exists()
    load_classifier(tmp_path / "out" / "model")
    assert not list((tmp_path / "out").glob("**/dense.safetensors"))


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_weights_that_a_kill_amid_publishing_took_are_trained_again(tmp_path, monkeypatch, name):
    from paucity import pipeline_images

    def killed(folder):
        (folder.partial / "stages" / f"{name}.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline_images.Folder, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(), tmp_path / "out")
    monkeypatch.undo()
    assert run(recipe(), tmp_path / "out", resume=True).steps[0].density == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("epochs", [0, 1])
def test_channels_go_for_good_and_the_model_loads_in_its_own_sizes(tmp_path, epochs):
    steps = [{"method": "channels", "sparsity": 0.5}]
    report = run(recipe(steps, training=TRAINING | {"finetune_epochs": epochs}), tmp_path / "out")
    model = load_classifier(tmp_path / "out" / "model")
    assert model.stem.out_channels == 2
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert report.sparse.images.num_nonzero == sum(int(p.count_nonzero()) for p in model.parameters())
    assert report.sparse.density["blocks.0.pointwise.weight"] == 0.25
    assert report.sparse.images.flops < 0.5 * report.dense.images.flops


def test_a_step_that_leaves_no_zero_is_trained_on(tmp_path):
    report = run(recipe([{"method": "magnitude", "sparsity": 0.0, "sites": ["pointwise"]}]), tmp_path / "out")
    assert report.steps[0].density is None
    assert report.sparse.density == {}


def test_without_the_data_the_fallback_is_taken_and_named(tmp_path, monkeypatch):
    monkeypatch.delenv("PAUCITY_DATA", raising=False)
    with pytest.raises(InputError, match=r"images must be there or have a fallback.*public at"):
        run(recipe(images=DIGITS | {"name": "fashion_mnist"}), tmp_path / "out")
    report = run(recipe(images=DIGITS | {"name": "fashion_mnist", "fallback": "digits"}), tmp_path / "out")
    assert "measured on digits" in report.model.notes[0]
    assert "digits test" in report.text.evaluated.names[0]
    assert set(SETS) >= {"digits", "fashion_mnist"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": [GRADUAL | {"sites": ["q"]}]}, "kinds must be in the model"),
        ({"steps": [{"method": "magnitude", "n": 2, "m": 3, "sites": ["pointwise"]}]}, "m must divide"),
        ({"training": TRAINING | {"arguments": {"wdth": 4}}}, r"training\.arguments must be arguments of a convnet"),
        ({"model": "nowhere"}, "folder must hold a convnet or vit that paucity saved, got nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, monkeypatch, fields, message):
    from paucity import pipeline_images

    monkeypatch.setattr(pipeline_images, "train", None)
    with pytest.raises(InputError, match=message):
        run(recipe(**fields), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_names_what_is_wrong_in_it():
    with pytest.raises(InputError, match=r"images\.name must be"):
        recipe(images={"name": "imagenet"})
    with pytest.raises(InputError, match=r"training\.epoch must be one of .*did you mean 'epochs'"):
        recipe(training={"epoch": 3})
    with pytest.raises(InputError, match="text must be left out of a recipe about images"):
        recipe().using(text="book.txt")
    with pytest.raises(InputError, match="steps must not train a language model, got gradual"):
        apply_step(None, "gradual", options_for("gradual")(), [])


def test_a_small_set_is_passed_over_more_often(tmp_path):
    few = run(recipe(), tmp_path / "few")
    more = run(recipe(training=TRAINING | {"min_steps": 80}), tmp_path / "more")
    assert more.dense.images.accuracy > few.dense.images.accuracy + 0.2
    assert more.sparse.images.accuracy > few.sparse.images.accuracy


def test_shipped_recipe():
    shipped = Recipe.load("recipes/prune_convnet.yaml")
    assert shipped.images.fallback == "digits"
    model = ConvNet(**shipped.training.arguments)
    assert torch.isfinite(model(torch.zeros(2, 1, 28, 28))).all()


def test_report_json_is_whole(tmp_path):
    run(recipe(), tmp_path / "out")
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["recipe"]["images"]["name"] == "digits"
    assert "measure" not in data["recipe"]
