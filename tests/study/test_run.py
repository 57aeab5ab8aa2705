import json
import sys

import pytest

from paucity.checks import InputError
from paucity.measure.retrieval import retrieval_accuracy
from paucity.study import Result, Worker, run
from paucity.study.results import ALL_TASKS


def test_what_reads_everything_is_dense_and_the_others_read_their_budget(study, loaded, tmp_path):
    everything = {"num_sinks": 0, "window_size": 1000}
    lines = (
        {"method": "sink_window", "label": "all", "at": {0.25: everything, 0.5: everything}},
        "sink_window",
        "knorm",
    )
    plan = study(methods=lines)
    result = run(plan, tmp_path / "out", loaded=loaded)
    assert Result.model_validate_json((tmp_path / "out/study.json").read_text()) == result
    rows = {(row.phase, row.method, row.task, row.budget): row for row in result.rows}
    assert len(rows) == len(result.rows) == 3 * (2 + 3 * 2)  # the random model can do no task, so there is no mean
    for task in ("passkey", "copying", "perplexity"):
        dense, full = rows["prefill", "dense", task, 1.0], rows["prefill", "all", task, 0.5]
        assert (dense.density, full.density) == (1, 1)
        assert full.value == pytest.approx(dense.value, rel=1e-3)
        assert full.change == pytest.approx(0, abs=1e-3)
        window = rows["prefill", "sink_window", task, 0.25]
        assert window.density == pytest.approx(0.25, abs=0.01)
        assert rows["decode", "knorm", task, 0.5].density == pytest.approx(0.5, abs=0.08)
    sparse = rows["prefill", "sink_window", "perplexity", 0.25]
    assert sparse.change == pytest.approx(sparse.value / rows["prefill", "dense", "perplexity", 1.0].value - 1)
    assert sparse.change != 0
    costs = {(cost.method, cost.budget): cost for cost in result.costs}
    assert set(costs) == {(line.label, budget) for line in plan.methods for budget in plan.budgets}
    assert costs["all", 0.5].work == pytest.approx(1, abs=1e-3)
    assert costs["sink_window", 0.25].work < costs["sink_window", 0.5].work < 1
    assert all(cost.seconds > 0 and cost.dense_seconds > 0 for cost in result.costs)
    assert not hasattr(loaded.model.model.layers[0].self_attn, "prefill_policy")


def test_scores_are_those_of_the_measure_with_the_same_seed(study, loaded):
    plan = study(seeds=2, methods=("sink_window",), phases=("prefill",))
    worker = Worker(plan, loaded)
    for cell in plan.cells():
        if cell.line == "dense" and cell.task == "copying":
            expected = retrieval_accuracy(
                loaded.model,
                loaded.tokenizer,
                task="copying",
                length=400,
                filler=worker.text,
                num_prompts=2,
                seed=cell.seed,
                mode="teacher_forced",
            )
            assert worker.measure(cell)["scores"] == list(expected.scores)


def test_a_knob_is_turned_until_the_budget_is_met(study, loaded):
    plan = study(methods=("xattention",), phases=("prefill",), lengths=(500,), repeats=0)
    worker = Worker(plan, loaded)
    found = {cell.budget: worker.policy(cell) for cell in plan.cells() if cell.line != "dense"}
    assert found[0.25].threshold < found[0.5].threshold
    cell = next(cell for cell in plan.cells() if cell.budget == 0.5)
    assert worker.measure(cell)["density"] == pytest.approx(0.5, abs=0.15)


def test_a_study_that_was_killed_goes_on_where_it_was(study, loaded, tmp_path, monkeypatch):
    plan, measure, seen = study(), Worker.measure, []

    def dies(self, cell):
        if len(seen) == 7:
            raise KeyboardInterrupt
        seen.append(cell)
        return measure(self, cell)

    def counts(self, cell):
        seen.append(cell)
        return measure(self, cell)

    monkeypatch.setattr(Worker, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "out", loaded=loaded)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Worker, "measure", counts)
    with pytest.raises(InputError, match="hold no unfinished run"):
        run(plan, tmp_path / "out", loaded=loaded)
    with pytest.raises(InputError, match="study: resume must continue a run of the same plan, got another"):
        run(study(seeds=2), tmp_path / "out", loaded=loaded, resume=True)
    told = []
    result = run(plan, tmp_path / "out", loaded=loaded, resume=True, on_progress=lambda *at: told.append(at))
    assert len(seen) == len(set(seen)) == len(list(plan.cells()))  # every cell once
    assert told[0][:2] == (7, len(seen))
    assert told[-1][:2] == (len(seen), len(seen))
    assert {"study.json", "study.html", "study.yaml"} == {path.name for path in (tmp_path / "out").iterdir()}
    assert len(json.loads((tmp_path / "out/study.json").read_text())["rows"]) == len(result.rows)
    with pytest.raises(InputError, match="out must not exist"):
        run(plan, tmp_path / "out", loaded=loaded)


def test_what_does_not_fit_is_refused_before_any_work(study, loaded, tmp_path):
    for fields, message in (
        ({"lengths": (1024,)}, "context of 512"),
        ({"tasks": ("key_value",)}, "length must be at least"),
        ({"methods": ({"method": "knorm", "options": {"nothing": 1}},), "phases": ("decode",)}, "nothing"),
    ):
        with pytest.raises(InputError, match=message):
            run(study(**fields), tmp_path / "out", loaded=loaded)
    with pytest.raises(InputError, match="workers must be 1 without --ray"):
        run(study(), tmp_path / "out", loaded=loaded, workers=2)
    assert not (tmp_path / "out.partial").exists()


def test_the_mean_of_the_tasks_is_that_of_all_prompts(study, loaded, monkeypatch, tmp_path):
    scores = {"passkey": [1.0, 1.0], "copying": [0.5, 0.0]}

    def measure(self, cell):
        if cell.task not in scores:
            return {"nats": [1.0, 2.0], "bytes": 9, "density": 1.0, "dense": {}}
        lost = 0.0 if cell.line == "dense" else 0.5
        values = [max(0.0, score - lost) for score in scores[cell.task]]
        return {"scores": values, "density": cell.budget, "dense": {"short": 1}}

    monkeypatch.setattr(Worker, "measure", measure)
    result = run(study(repeats=0), tmp_path / "out", loaded=loaded)
    means = {(row.method, row.budget): row for row in result.rows if row.task == ALL_TASKS and row.phase == "decode"}
    assert means["dense", 1.0].value == pytest.approx(2.5 / 4)
    assert means["knorm", 0.25].value == pytest.approx(1 / 4)
    assert means["knorm", 0.25].change == pytest.approx(-1.5 / 4)
    assert means["knorm", 0.25].dense_texts == {"short": 2}


def test_texts_that_are_too_short_and_what_is_not_installed_leave_no_folder(study, loaded, tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("a few words")
    for name in ("ray", "lm_eval"):
        monkeypatch.setitem(sys.modules, name, None)
    prefill = {"tasks": ("perplexity",), "methods": ("sink_window",), "repeats": 0}
    for fields, message in (
        ({"text": str(tmp_path / "short.txt")}, "text must have at least 399 tokens"),
        ({"lengths": (1024,)}, "context of 512"),
        ({"methods": ("xattention",), "calibration_text": str(tmp_path / "short.txt")}, "text must have at least"),
        ({"lm_eval": ("arc_easy",)}, r"pip install 'paucity\[study\]'"),
    ):
        with pytest.raises(InputError, match=message):
            run(study(**prefill | fields), tmp_path / "out", loaded=loaded)
    with pytest.raises(InputError, match=r"pip install 'paucity\[ray\]'"):
        run(study(), tmp_path / "out", loaded=loaded, ray=True)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("changed", ["text.py", "model/config.json", "model/more.safetensors"])
def test_other_texts_or_another_model_are_not_resumed(study, loaded, tmp_path, monkeypatch, changed):
    loaded.model.save_pretrained(tmp_path / "model")

    def dies(self, cell):
        raise RuntimeError("killed")

    monkeypatch.setattr(Worker, "measure", dies)
    plan = study(model=str(tmp_path / "model"))
    for resume in (False, True):
        with pytest.raises(RuntimeError, match="killed"):
            run(plan, tmp_path / "out", loaded=loaded, resume=resume)
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="resume must continue a run of the same plan"):
        run(plan, tmp_path / "out", loaded=loaded, resume=True)
