"""Recipes: what is read is what was meant, and what is wrong is said in one line with the nearest right key."""

from pathlib import Path

import pytest
import yaml

from paucity.checks import InputError
from paucity.recipe import Recipe

WANDA = {"method": "wanda", "sparsity": 0.5}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    assert Recipe.load(path).steps


def test_options_take_the_defaults_of_the_method():
    recipe = Recipe.build(steps=[WANDA])
    assert recipe.steps[0].options.sparsity == 0.5
    assert recipe.steps[0].options.scope == "row"
    assert recipe.measure.prefill_tokens == 4096


def test_yaml_round_trip(tmp_path):
    recipe = Recipe.build(seed=3, measure={"stride": 64}, steps=[WANDA, {"method": "vertical_slash"}])
    assert Recipe.load(write(tmp_path, recipe.to_yaml())) == recipe
    assert yaml.safe_load(recipe.to_yaml())["steps"][0] == WANDA


def test_using_changes_only_what_is_given():
    recipe = Recipe.build(steps=[WANDA])
    assert recipe.using() == recipe
    other = recipe.using(model="elsewhere", text="a.txt")
    assert (other.model, other.measure.text, other.calibration.text) == ("elsewhere", "a.txt", "python")


BAD = [
    ({}, "steps must be given"),
    ({"steps": []}, "steps must"),
    ({"steps": [WANDA], "modle": "x"}, r"modle must be one of .*, got modle \(did you mean 'model'\?\)"),
    ({"steps": [WANDA], "measure": {"strid": 4}}, r"measure.strid must be .*did you mean 'stride'"),
    ({"steps": [WANDA], "measure": {"retrieval": {"task": []}}}, r"measure.retrieval.task must .*did you mean 'tasks'"),
    ({"steps": [WANDA], "measure": {"kick": {"task": []}}}, r"measure.kick.task must .*did you mean 'tasks'"),
    ({"steps": [WANDA], "measure": {"kick": {"tasks": ["all"]}}}, r"measure.kick.tasks\[0\] must"),
    ({"steps": [WANDA | {"sparsty": 1}]}, r"steps\[0\].sparsty must be .*did you mean 'sparsity'"),
    ({"steps": [{"method": "wnada"}]}, r"method must be one of .*did you mean 'wanda'"),
    ({"steps": [{"sparsity": 0.5}]}, r"steps\[0\].method must be given"),
    ({"steps": ["wanda"]}, r"steps\[0\]"),
    ({"steps": [WANDA | {"sparsity": 1.0}]}, r"steps\[0\].sparsity must .*got 1.0"),
    ({"steps": [WANDA | {"sparsity": -0.1}]}, r"steps\[0\].sparsity must"),
    ({"steps": [WANDA | {"sparsity": "half"}]}, r"steps\[0\].sparsity must"),
    ({"steps": [WANDA], "dtype": "int8"}, "dtype must"),
    ({"steps": [WANDA], "measure": {"length": 8, "stride": 9}}, "stride must be at most length"),
    ({"steps": [WANDA], "calibration": {"num_samples": 0}}, "calibration.num_samples must"),
]


@pytest.mark.parametrize(("data", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_recipes_are_refused_in_one_line(tmp_path, data, message):
    with pytest.raises(InputError, match=message) as caught:
        Recipe.load(write(tmp_path, yaml.safe_dump(data)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("steps: [", "valid YAML"), ("- a", "mapping"), ("", "mapping"), ("a: !!python/name:os.system", "valid YAML")],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        Recipe.load(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Recipe.load(tmp_path / "none.yaml")
