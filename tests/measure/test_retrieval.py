import random
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from paucity.checks import InputError
from paucity.measure.prompts import TASKS
from paucity.measure.retrieval import ANSWER_SLACK, answer_score, build_prompt, generate_answer, retrieval_accuracy

FILLER = "".join(f"line {i} of the haystack\n" for i in range(200))


class Reader(nn.Module):
    """Knows the pass key when it stands in the first half of the prompt, and all of it when teacher-forced."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.wrong_end = 0

    def generate(self, ids, attention_mask, generation_config):
        text = self.tokenizer.decode(ids[0])
        found = re.search(r"pass key is (\d+)\. Remember", text[: len(text) // 2])
        answer = f" {found[1]}.\n" if found else " none"
        new = self.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.cat([ids, new[:, : generation_config.max_new_tokens]], dim=1)

    def forward(self, input_ids, logits_to_keep=0):
        number = re.search(r"pass key is (\d+)", self.tokenizer.decode(input_ids[0]))[1]
        last = self.tokenizer(number[-1], add_special_tokens=False)["input_ids"][0]
        following = nn.functional.pad(input_ids[:, 1:], (0, 1), value=last + self.wrong_end)
        return SimpleNamespace(logits=nn.functional.one_hot(following, 300).float()[:, -logits_to_keep:])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bos", [True, False])
def test_build_prompt(byte_tokenizer, task, seed, bos):
    tokenizer = byte_tokenizer(bos=bos)
    filler = tokenizer(FILLER, add_special_tokens=False)["input_ids"]
    fact = TASKS[task](random.Random(seed))
    prompt = build_prompt(tokenizer, fact, filler, 1600, random.Random(seed))
    assert len(prompt.ids) + len(prompt.answer_ids) + ANSWER_SLACK == 1600
    assert prompt == build_prompt(tokenizer, fact, filler, 1600, random.Random(seed))
    assert prompt != build_prompt(tokenizer, fact, filler, 1600, random.Random(seed + 100))
    assert (prompt.ids[0] == 0) == bos
    text = tokenizer.decode(prompt.ids, skip_special_tokens=True)
    assert text.endswith("\n" + fact.question)
    assert tokenizer.decode(prompt.answer_ids) == " " + ", ".join(fact.answers)
    spots = [text.index(needle) for needle in fact.needles]
    assert spots == sorted(spots)  # one byte a token but for "ab", so depths are near the text's
    assert prompt.depths == pytest.approx([spot / len(text) for spot in spots], abs=0.01)
    for line in (*fact.needles, *fact.distractors):
        assert text.count(line) == 1
        assert text.index(line) < 25 or text[text.index(line) - 1] == "\n"
        text = text.replace(line, "")
    assert text[: -len(fact.question) - 1] in FILLER  # without the lines a stretch of the filler is left


@pytest.mark.parametrize("mode", ["generate", "teacher_forced"])
def test_accuracy_of_a_reader(tokenizer, mode):
    model, calls = Reader(tokenizer), []
    options = {"task": "passkey", "length": 400, "num_prompts": 30, "seed": 1, "filler": FILLER, "mode": mode}
    result = retrieval_accuracy(model, tokenizer, **options, on_progress=lambda *a: calls.append(a))
    assert calls[-1] == (30, 30)
    assert result == retrieval_accuracy(model, tokenizer, **options)
    assert sum(d.accuracy.num_samples for d in result.by_depth) == 30
    if mode == "teacher_forced":
        assert result.accuracy.value == 1
        assert 0.85 < result.accuracy.low < 0.9  # Wilson's for 30 of 30
        model.wrong_end = 1  # one wrong token spoils an answer
        assert retrieval_accuracy(model, tokenizer, **options).accuracy.value == 0
    else:
        assert 0.2 < result.accuracy.value < 0.8
        assert {d.accuracy.value for d in result.by_depth if d.high < 0.5} == {1}
        assert {d.accuracy.value for d in result.by_depth if d.low > 0.5} == {0}


class Oracle(nn.Module):
    """Says what is asked for, but for the tokens at some places of the answer."""

    def __init__(self, answer_ids, wrong):
        super().__init__()
        self.answer_ids, self.wrong = list(answer_ids), wrong

    def said(self):
        return [(token + 1) % 300 if i in self.wrong else token for i, token in enumerate(self.answer_ids)]

    def generate(self, ids, attention_mask, generation_config):
        return torch.cat([ids, torch.tensor([self.said() + [0] * ANSWER_SLACK])], dim=1)

    def forward(self, input_ids, logits_to_keep=0):
        return SimpleNamespace(logits=nn.functional.one_hot(torch.tensor([self.said()]), 300).float())


@pytest.mark.parametrize(
    ("task", "wrong", "forced", "generated"),
    [
        ("copying", {0, 2}, "tokens", "tokens"),
        ("multi_value", {1}, 2 / 3, 2 / 3),  # one digit of the first of three numbers
        ("multi_value", {1, 7}, 2 / 3 - 1 / 3, None),
        ("threading", {2}, 0, 0),
    ],
)
def test_what_a_wrong_token_costs(tokenizer, monkeypatch, task, wrong, forced, generated):
    from paucity.measure import retrieval

    filler = tokenizer(FILLER, add_special_tokens=False)["input_ids"]
    prompt = build_prompt(tokenizer, TASKS[task](random.Random(0)), filler, 1300, random.Random(0))
    monkeypatch.setattr(retrieval, "build_prompt", lambda *a, **o: prompt)
    model = Oracle(prompt.answer_ids, wrong)
    tokens = 1 - len(wrong) / len(prompt.answer_ids)
    for mode, wanted in (("teacher_forced", forced), ("generate", generated)):
        options = {"task": task, "length": 1300, "filler": FILLER, "num_prompts": 1, "mode": mode}
        score = retrieval_accuracy(model, tokenizer, **options).accuracy.value
        if wanted is not None:
            assert score == pytest.approx(tokens if wanted == "tokens" else wanted)


def test_generate_equals_uncached_decoding(llama, tokenizer, monkeypatch):
    filler = tokenizer(FILLER, add_special_tokens=False)["input_ids"]
    prompt = build_prompt(tokenizer, TASKS["passkey"](random.Random(0)), filler, 300, random.Random(0))
    defaults = GenerationConfig(do_sample=True, temperature=50.0)  # a model's own must not matter
    monkeypatch.setattr(llama, "generation_config", defaults)
    ids = torch.tensor([prompt.ids])
    for _ in range(len(prompt.answer_ids) + ANSWER_SLACK):
        with torch.no_grad():
            ids = torch.cat([ids, llama(ids).logits[:, -1:].argmax(-1)], dim=1)
    naive = tokenizer.decode(ids[0, len(prompt.ids) :], skip_special_tokens=True)
    assert generate_answer(llama, tokenizer, prompt) == naive


@pytest.mark.parametrize("task", TASKS)
def test_random_model_knows_nothing(llama, tokenizer, task):
    result = retrieval_accuracy(llama, tokenizer, task=task, length=1300, num_prompts=2, filler=FILLER)
    assert result.accuracy.value <= (0.02 if task == "copying" else 0)  # one of its many tokens may be right by luck
    assert bool(result.by_depth) == (task in ("passkey", "key_value", "copying"))


def test_answer_score():
    assert answer_score(" 12345.\nThe", ["12345"]) == 1
    assert answer_score(" 123456", ["12345"]) == 0
    assert answer_score(" 99999, 12345", ["12345"]) == 0
    assert answer_score(" 3, 1 and 13", ["1", "2", "3"]) == pytest.approx(2 / 3)


def test_bad_input(llama, tokenizer):
    with pytest.raises(InputError, match=r"length must be at least 108 for this fact, got 60\."):
        retrieval_accuracy(llama, tokenizer, task="passkey", length=60, filler=FILLER)
    with pytest.raises(InputError, match=r"task must be one of .* got pass_key \(did you mean 'passkey'\?\)\."):
        retrieval_accuracy(llama, tokenizer, task="pass_key", length=400, filler=FILLER)
    with pytest.raises(InputError, match=r"filler must have at least 292 tokens, got 5\."):
        retrieval_accuracy(llama, tokenizer, task="passkey", length=400, filler="short")
    with pytest.raises(InputError, match="context of 2048"):
        retrieval_accuracy(llama, tokenizer, task="passkey", length=4096, filler=FILLER)
    with pytest.raises(InputError, match="mode must be one of generate, teacher_forced, got sampled"):
        retrieval_accuracy(llama, tokenizer, task="passkey", length=400, filler=FILLER, mode="sampled")
