import importlib.util

import pytest

from paucity.checks import InputError
from paucity.measure.harness import evaluate
from paucity.study import run

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
HAS_RAY = importlib.util.find_spec("ray") is not None
TASK = """
task: vowels
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(HAS_LM_EVAL, reason="lm-eval is installed")
def test_without_lm_eval_it_says_what_to_install(loaded):
    with pytest.raises(InputError, match=r"pip install 'paucity\[study\]'"):
        evaluate(loaded.model, loaded.tokenizer, "lambada")


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_it_says_what_to_install(study, loaded, tmp_path):
    with pytest.raises(InputError, match=r"pip install 'paucity\[ray\]'"):
        run(study(), tmp_path / "out", loaded=loaded, ray=True)


@pytest.mark.skipif(not HAS_LM_EVAL, reason="needs lm-eval (pip install 'paucity[study]')")
@pytest.mark.filterwarnings("default")
def test_a_task_of_lm_eval_is_one_of_the_study(study, loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "test.jsonl"
    data.write_text("".join(f'{{"text": "def f{i}(", "label": {i % 2}}}\n' for i in range(6)))
    task = tmp_path / "vowels.yaml"
    task.write_text(TASK.format(data=data))
    found = evaluate(loaded.model, loaded.tokenizer, str(task), limit=4)
    assert len(found["scores"]) == 4
    assert set(found["scores"]) <= {0.0, 1.0}
    plan = study(tasks=(), lm_eval=(str(task),), methods=("sink_window",), phases=("prefill",), repeats=0)
    rows = run(plan, tmp_path / "out", loaded=loaded).rows
    assert {row.num_prompts for row in rows} == {6}
    with pytest.raises(InputError, match="lm_eval must name a task"):
        evaluate(loaded.model, loaded.tokenizer, "no_such_task_at_all")


@pytest.mark.skipif(not HAS_RAY, reason="needs Ray (pip install 'paucity[ray]')")
@pytest.mark.filterwarnings("default")
def test_processes_measure_what_one_does(study, loaded, tmp_path):
    folder = tmp_path / "model"
    loaded.model.save_pretrained(folder)
    plan = study(model=str(folder), methods=("sink_window",), phases=("prefill",), repeats=0)
    alone = run(plan, tmp_path / "alone")
    many = run(plan, tmp_path / "many", workers=2, ray=True)
    assert many.rows == alone.rows
