import pytest
import torch

from paucity.checks import InputError
from paucity.measure.knowledge import is_right, multiple_choice, written_answers
from paucity.measure.questions import Question

QUESTIONS = [
    Question("class A(", ("Base",), ("Base", "ab", "other"), "class A(Base): pass"),
    Question("os.", ("path",), ("sep", "path"), "os.path and os.sep"),
    Question("x = a", ("b", "bb"), ("b", "c", "dd", "bb"), "b"),  # "ab" is one token: the seam moves
]


def naive(model, tokenizer, question, *, open_book, per_byte):
    """One sequence at a time, one token at a time."""
    text = (question.context + "\n" if open_book else "") + question.prompt
    prompt = tokenizer(text)["input_ids"]
    whole = [tokenizer(text + choice)["input_ids"] for choice in question.choices]
    seam = min(
        next((i for i in range(len(prompt)) if i >= len(ids) or ids[i] != prompt[i]), len(prompt)) for ids in whole
    )
    best = []
    for ids, choice in zip(whole, question.choices, strict=True):
        total = 0.0
        for i in range(seam, len(ids)):
            logits = model(input_ids=torch.tensor([ids[:i]])).logits[0, -1].double()
            total += float(logits.log_softmax(-1)[ids[i]])
        best.append(total / (len(choice.encode()) if per_byte else 1))
    return question.choices[best.index(max(best))]


@pytest.mark.parametrize("open_book", [False, True])
@pytest.mark.parametrize("per_byte", [False, True])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_choices_match_naive(llama, tokenizer, open_book, per_byte, batch_size):
    with torch.no_grad():
        expected = [naive(llama, tokenizer, q, open_book=open_book, per_byte=per_byte) for q in QUESTIONS]
    how = {"open_book": open_book, "per_byte": per_byte, "batch_size": batch_size}
    found = multiple_choice(llama, tokenizer, QUESTIONS, **how)
    assert list(found.given) == expected
    assert found.scores == tuple(float(text in q.answers) for text, q in zip(expected, QUESTIONS, strict=True))
    assert found.chance == pytest.approx((1 / 3 + 1 / 2 + 2 / 4) / 3)


def test_the_likeliest_choice_is_right_when_it_is_named(llama, tokenizer):
    given = multiple_choice(llama, tokenizer, QUESTIONS).given
    right = [Question(q.prompt, (text,), q.choices) for q, text in zip(QUESTIONS, given, strict=True)]
    assert multiple_choice(llama, tokenizer, right).accuracy.value == 1.0


def test_written_answers_are_greedy(llama, tokenizer):
    found = written_answers(llama, tokenizer, QUESTIONS)
    for question, text in zip(QUESTIONS, found.given, strict=True):
        ids = tokenizer(question.prompt)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            for _ in range(3):
                ids.append(int(llama(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert text.startswith(tokenizer.decode(ids[start:], skip_special_tokens=True))
    assert found.chance == 0.0
    assert found.scores == tuple(float(is_right(t, q.answers)) for t, q in zip(found.given, QUESTIONS, strict=True))


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        (" Paris.\n", ["paris"], True),
        ("OSError):", ["Exception", "OSError"], True),
        ("OSErrors", ["OSError"], False),
        ("enum.Enum)", ["enum"], False),
        ("a+b", ["a+b"], True),
        ("aab", ["a+b"], False),
        ("", ["x"], False),
    ],
)
def test_an_answer_is_right_as_a_whole_word(text, answers, right):
    assert is_right(text, answers) is right


def test_a_broken_model_is_right_nowhere(llama, tokenizer):
    import copy

    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    assert multiple_choice(broken, tokenizer, QUESTIONS).accuracy.value == 0.0


@pytest.mark.parametrize(
    ("questions", "how", "message"),
    [
        ([], {}, "questions must hold at least one"),
        ([Question("a", ("b",))], {}, "choices must be at least 2, got 0 in question 1"),
        ([Question("a", ("b",), ("b", "c"))], {"open_book": True}, "context must be given for an open book"),
        ([Question("a" * 2048, ("b",), ("b", "c"))], {}, "context of 2048 tokens, got 20.. in question 1"),
        (QUESTIONS, {"batch_size": 0}, "batch_size must be"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(llama, tokenizer, questions, how, message, monkeypatch):
    monkeypatch.setattr("paucity.measure.knowledge.forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=message):
        multiple_choice(llama, tokenizer, questions, **how)
