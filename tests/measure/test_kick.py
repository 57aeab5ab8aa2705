"""Abilities of two models side by side, on a tiny model and short lists of what is asked."""

import copy
import json

import pytest
import torch

from paucity.checks import InputError
from paucity.measure import kick_jobs
from paucity.measure.abilities import Scores, paired
from paucity.measure.kick import abilities_of, compare_abilities
from paucity.measure.kick_jobs import prepare
from paucity.measure.kick_options import Kick
from paucity.measure.questions import Question

TEXT = "def f(x):\n    return abs(x) + 1\n" * 60
CHOICES = ("a", "bb", "c", "d")
ASKED = [Question(f"def f{i}(", (CHOICES[i % 4],), CHOICES, f"def f{i}({CHOICES[i % 4]}): pass") for i in range(24)]
SMALL = {"length": 512, "num_prompts": 2, "num_summaries": 3, "num_choices": 4, "max_tokens": 300, "num_written": 2}


@pytest.fixture
def no_library(monkeypatch):
    """The standard library is not read: that takes seconds."""
    monkeypatch.setattr(kick_jobs, "python_facts", lambda num, **_: ASKED[:num])


@pytest.fixture
def options():
    return Kick(retrieval=("passkey",), **SMALL)


def both(llama):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight.mul_(torch.rand_like(other.lm_head.weight) > 0.5)
    return {"dense": llama, "sparse": other}


@pytest.mark.usefixtures("no_library")
def test_every_task_has_figures_of_both(llama, tokenizer, options):
    written = options.model_copy(update={"written_summaries": True})
    jobs, kept = prepare(written, llama, tokenizer, TEXT), {}

    def stage(name, make):
        kept[name] = json.dumps(make())
        return json.loads(kept[name])

    found = {a.name: a for a in compare_abilities(written, jobs, both(llama), tokenizer, TEXT, stage=stage)}
    assert list(found) == [
        *("perplexity", "loss", "same_top", "divergence", "knowledge", "written", "control", "open_book"),
        *("retrieval.passkey", "summary", "rouge", "rouge_dense", "choice.next_lines"),
    ]
    assert found["knowledge"].chance == 0.25
    assert found["open_book"].num == 24
    assert 0 < found["same_top"].sparse.value < 1
    assert found["divergence"].sparse.value > 0
    assert set(kept) == {"kick.agreement"} | {f"{s}.kick.{j.name}" for s in ("dense", "sparse") for j in jobs}
    again = compare_abilities(written, jobs, both(llama), tokenizer, TEXT, stage=lambda n, _: json.loads(kept[n]))
    assert again == list(found.values())
    alone = abilities_of(written, jobs, llama, tokenizer, TEXT)
    assert {a.name: a.sparse.value for a in alone if a.name in ("knowledge", "summary")} == {
        name: found[name].dense.value for name in ("knowledge", "summary")
    }


@pytest.mark.usefixtures("no_library")
def test_a_model_beside_itself_has_lost_nothing(llama, tokenizer, options):
    jobs = prepare(options, llama, tokenizer, TEXT)
    for ability in compare_abilities(options, jobs, {"dense": llama, "sparse": llama}, tokenizer, TEXT):
        assert ability.change is None or ability.change.value == pytest.approx(0)
        assert not ability.lost
        assert not ability.gained


def test_files_of_the_user_and_nothing_else(llama, tokenizer, tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"question": "a?", "answer": "b"}) + "\n")
    tasks = ("knowledge", "written", "control", "open_book")
    jobs = prepare(Kick(tasks=tasks, questions=str(path)), llama, tokenizer, TEXT)
    assert [job.name for job in jobs] == ["written"]
    with pytest.raises(InputError, match="tasks must hold at least one of"):
        prepare(Kick(tasks=("knowledge",), questions=str(path)), llama, tokenizer, TEXT)
    with pytest.raises(InputError, match="choices must be at least 2"):
        prepare(Kick(tasks=("choice",), choices=(str(path),)), llama, tokenizer, TEXT)
    with pytest.raises(InputError, match="python or a JSON Lines file that exists"):
        prepare(Kick(tasks=("summary",), summaries="absent.jsonl"), llama, tokenizer, TEXT)
    path.write_text(json.dumps({"question": "a" * 3000, "answer": "b"}) + "\n")
    with pytest.raises(InputError, match="fit with its answer into the model's context of 2048"):
        prepare(Kick(tasks=("written",), questions=str(path)), llama, tokenizer, TEXT)


@pytest.mark.usefixtures("no_library")
def test_a_short_context_leaves_out_what_does_not_fit(tiny_model, byte_tokenizer):
    model = tiny_model("llama", vocab_size=300)  # 256 positions
    jobs = prepare(Kick(), model, byte_tokenizer(bos=True), TEXT)
    assert {"knowledge", "open_book"} <= {job.name for job in jobs}
    assert not any(job.name.startswith("retrieval") for job in jobs)


def test_changes_are_relative_to_what_is_above_chance():
    dense, sparse = Scores([1.0] * 80 + [0.0] * 20, None, 0.3), Scores([1.0] * 60 + [0.0] * 40, None, 0.3)
    found = paired("a", "knowledge", "A", "share", dense, sparse)
    assert found.change.value == pytest.approx((0.6 - 0.8) / (0.8 - 0.3))
    assert found.change.low < found.change.value < found.change.high < 0
    assert (found.lost, found.gained) == (pytest.approx(0.2), 0.0)
    guessed = paired("a", "knowledge", "A", "share", Scores([1.0, 0.0], None, 0.4), Scores([1.0, 1.0], None, 0.4))
    assert guessed.change is None
    gone = paired("a", "context", "A", "share", Scores([1.0] * 9), Scores([0.0] * 9))
    assert gone.change.low == gone.change.value == -1
    bits = paired(
        "a", "summary", "A", "bits", Scores([2.0, 4.0], [1.0, 2.0], None), Scores([1.0, 2.0], [1.0, 2.0], None)
    )
    assert (bits.dense.value, bits.sparse.value, bits.change.value) == (2.0, 1.0, -0.5)
    with pytest.raises(InputError, match="baseline must have"):
        paired("a", "knowledge", "A", "share", dense, Scores([1.0] * 3))


def test_quick_asks_less():
    full, quick = Kick(), Kick().quick()
    assert (full.num_questions // 4, 4096) == (quick.num_questions, quick.max_tokens)
