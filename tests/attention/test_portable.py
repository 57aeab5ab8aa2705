"""Policies as JSON, and what is wrong with them."""

import json

import pytest

from paucity.attention import PerHead, SinkWindow, VerticalSlash, from_json, load_policy, save_policy, to_json
from paucity.checks import InputError, InputTypeError
from paucity.recipe import Recipe

POLICY = PerHead(
    choices=[SinkWindow(num_sinks=4, window_size=64), VerticalSlash(vertical_share=0.05)],
    assignment=[[0, 1], 1],
    layers=[0],
)


def test_a_policy_is_saved_and_loaded(tmp_path):
    path = tmp_path / "heads.json"
    save_policy(POLICY, path)
    assert load_policy(path) == POLICY
    assert to_json(POLICY)["choices"][1] == {"method": "vertical_slash", "vertical_share": 0.05}
    save_policy(SinkWindow(), path)
    assert load_policy(path) == SinkWindow()
    assert list(tmp_path.iterdir()) == [path]


def test_a_recipe_takes_a_policy_from_a_file_or_in_place(tmp_path):
    path = tmp_path / "heads.json"
    save_policy(POLICY, path)
    plain = Recipe.build(steps=[json.loads(path.read_text())])
    assert plain.steps[0].options == POLICY
    filed = Recipe.build(steps=[{"method": "per_head", "file": str(path), "min_length": 7}])
    assert filed.steps[0].options == POLICY.model_copy(update={"min_length": 7})
    text = tmp_path / "recipe.yaml"
    text.write_text(filed.to_yaml())
    assert Recipe.load(text).steps[0].options == filed.steps[0].options


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"num_sinks": 4}, "method must be given"),
        ({"method": "sink_windw"}, "did you mean 'sink_window'"),
        ({"method": "wanda"}, "method must be one of"),
        ({"method": "sink_window", "window_size": 0}, "sink_window must have valid options, got window_size"),
        ({"method": "per_head", "choices": [{"method": "sink_window", "size": 1}], "assignment": [0]}, "size"),
    ],
)
def test_wrong_json_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        from_json(data)


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="which does not exist"):
        load_policy(tmp_path / "none.json")
    with pytest.raises(InputError, match="path must be a path, got int"):
        from_json({"method": "per_head", "file": 3})
    path = tmp_path / "x.json"
    for text, message in (("{", "must be valid JSON or YAML"), ("[1]", "must hold a mapping, got list")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            load_policy(path)
    save_policy(SinkWindow(), path)
    with pytest.raises(InputError, match="file must hold a per_head policy"):
        Recipe.build(steps=[{"method": "per_head", "file": str(path)}])
    with pytest.raises(InputTypeError, match="policy must be a mapping, got list"):
        from_json([])
