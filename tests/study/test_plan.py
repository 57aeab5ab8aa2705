from pathlib import Path

import pytest

from paucity.checks import InputError
from paucity.study import Knob, Line, Study, default_study
from paucity.study.methods import METHODS_AT, causal_keys, phase_of
from paucity.study.worker import build


def test_a_study_read_back_from_its_yaml_is_the_same(study, tmp_path):
    plan = study(methods=("knorm", {"method": "sink_window", "label": "no sinks", "options": {"num_sinks": 0}}))
    path = tmp_path / "study.yaml"
    path.write_text(plan.to_yaml())
    assert Study.load(path) == plan
    assert [line.label for line in plan.methods] == ["knorm", "no sinks"]
    assert plan.changed(seeds=3, tasks=None) == study(methods=plan.methods, seeds=3)


def test_every_cell_has_a_name_of_its_own(study):
    plan = study(seeds=2, lengths=(350, 400))
    cells = list(plan.cells())
    # Tasks, seeds and lengths for dense in both phases and for two methods at two budgets; then costs.
    assert len(cells) == 3 * 2 * 2 * (2 + 2 * 2) + 2 * 2 * 2
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.phase for cell in cells if cell.line == "knorm"} == {"decode"}
    assert [cell.task == "cost" for cell in cells] == sorted(cell.task == "cost" for cell in cells)


def test_cells_that_differ_little_have_names_of_their_own(study):
    plan = study(
        methods=({"method": "sink_window", "label": "x y"}, {"method": "sink_window", "label": "x_y"}),
        budgets=(0.1, 0.1000001),
        lm_eval=("a/b", "a_b", "a/" * 200),
    )
    names = [cell.name for cell in plan.cells()]
    assert len({name.lower() for name in names}) == len(names)
    assert all(len(name) < 200 and "/" not in name for name in names)


def test_lm_eval_measures_the_prefill_alone(study):
    cells = list(study(lm_eval=("arc_easy",)).cells())
    assert {cell.phase for cell in cells if cell.task == "lm-eval:arc_easy"} == {"prefill"}


def test_phases_are_those_of_the_methods_unless_they_are_given(study, tmp_path):
    (tmp_path / "plan.yaml").write_text("methods: [{method: knorm, label: keys}]")
    plan = Study.load(tmp_path / "plan.yaml")
    assert plan.phases == ("decode",)
    assert plan.changed(methods=["sink_window"]).phases == ("prefill",)
    assert plan.changed(methods=["sink_window", "knorm"]).phases == ("prefill", "decode")
    assert study(methods=["sink_window", "knorm"], phases=["decode"]).phases == ("decode",)
    assert default_study(methods=[{"method": "knorm"}]).phases == ("decode",)
    with pytest.raises(InputError, match="methods"):
        default_study(methods=[{"label": "none"}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": ["sink_windo"]}, r"method must be one of .*\(did you mean 'sink_window'\?\)"),
        ({"methods": ["wanda"]}, "method must be one of"),
        ({"methods": ["grid"]}, "without `at` for every budget"),
        ({"methods": ["knorm", "knorm"]}, r"methods\[1\].label must be new, got knorm"),
        ({"methods": [{"method": "knorm", "label": "dense"}]}, "must be new, got dense"),
        ({"methods": [{"method": "knorm", "budget": 1}]}, "budget must be one of method, label, options, at"),
        ({"methods": []}, "methods must have at least 1 item"),
        ({"tasks": ["paskey"]}, "tasks\\[0\\] must be 'passkey'"),
        ({"tasks": []}, "tasks must name at least one"),
        ({"budgets": [0.5, 1.0]}, r"budgets\[1\] must be less than 1"),
        ({"phases": ["prefill"], "methods": ["knorm"]}, "phases must be those of the methods, got prefill"),
        ({"tasks": ["passkey", "copying", "passkey"]}, "tasks must name nothing twice, got passkey again"),
        ({"budgets": [0.1, 0.10]}, "budgets must name nothing twice, got 0.1 again"),
        ({"lengths": [400, 400]}, "lengths must name nothing twice"),
        ({"phases": ["decode", "decode"]}, "phases must name nothing twice"),
        ({"lm_eval": ["arc_easy", "arc_easy"]}, "lm_eval must name nothing twice"),
        ({"methods": ["knorm"], "lm_eval": ["arc_easy"]}, "lm_eval must come with methods that make the prefill"),
        ({"tasks": [], "lm_eval": ["arc_easy"]}, "tasks must name at least one for the decode phase"),
        ({"lenghts": [5]}, r"lenghts must be one of .*did you mean 'lengths'"),
    ],
)
def test_what_is_wrong_is_one_line(study, fields, message):
    with pytest.raises(InputError, match=message) as error:
        study(**fields)
    assert "\n" not in str(error.value)


def test_the_default_studies():
    assert {line.method for line in default_study().methods} == set(METHODS_AT)
    quick = default_study(quick=True, methods=["knorm"])
    assert quick.phases == ("decode",)
    assert quick.num_prompts < default_study().num_prompts
    assert {line.phase for line in default_study(quick=True).methods} == {"prefill", "decode"}


@pytest.mark.parametrize("method", METHODS_AT)
@pytest.mark.parametrize("budget", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("length", [128, 1000, 32768])
def test_every_budget_gives_valid_options(method, budget, length):
    options = Line(method=method, label=method).options_at(budget, length)
    for value in (0.01, options.high) if isinstance(options, Knob) else ():
        build(method, options.options(value))
    if not isinstance(options, Knob):
        policy = build(method, options)
        assert getattr(policy, "min_length", 0) == 0
    assert phase_of(method) in ("prefill", "decode")


def test_options_of_the_line_go_before_those_of_the_budget():
    line = Line(method="sink_window", label="x", options={"num_sinks": 1}, at={0.5: {"window_size": 9}})
    assert line.options_at(0.5, 100) == {"num_sinks": 1, "window_size": 9}
    assert line.options_at(0.1, 1000)["num_sinks"] == 1
    knob = Line(method="flexprefill", label="x", options={"tau": 0.0}).options_at(0.1, 100)
    assert knob.options(0.3) == {"q_block": 16, "min_budget": 16, "gamma": 0.3, "tau": 0.0}


@pytest.mark.parametrize("budget", [0.05, 0.3, 0.75])
def test_causal_keys_make_up_the_budget(budget):
    keys = causal_keys(budget, 2000)
    pairs = sum(min(i + 1, keys) for i in range(2000))
    assert pairs / (2000 * 2001 / 2) == pytest.approx(budget, abs=2e-3)


def test_the_study_in_the_documentation_is_one(tmp_path):
    text = (Path(__file__).parents[2] / "docs/study.md").read_text()
    (tmp_path / "plan.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    plan = Study.load(tmp_path / "plan.yaml")
    assert [line.label for line in plan.methods] == ["quest", "no sinks", "grid"]
    for budget in plan.budgets:
        build("grid", plan.methods[2].options_at(budget, 2048))
