import json

import pytest

from paucity.checks import InputError
from paucity.measure.questions import Question, draw, read_questions, read_summaries

CAPITAL = {"question": "Capital of France?", "answer": "Paris", "choices": ["Paris", "Rome"]}


@pytest.fixture
def file(tmp_path):
    def write(*entries) -> str:
        path = tmp_path / "file.jsonl"
        path.write_text("".join(f"{e if isinstance(e, str) else json.dumps(e)}\n" for e in entries))
        return str(path)

    return write


def test_a_question_is_asked_and_a_prompt_stands_as_it_is(file):
    cloze = {"prompt": "Paris is in", "answer": [" France", " Gaul"], "context": "Of Paris."}
    asked, plain = read_questions(file(CAPITAL, "", cloze))
    assert asked == Question("Question: Capital of France?\nAnswer:", (" Paris",), (" Paris", " Rome"))
    assert plain.text(open_book=True) == "Of Paris.\nParis is in"
    assert (plain.prompt, plain.answers) == ("Paris is in", (" France", " Gaul"))


def test_an_index_and_several_answers_name_the_choice(file):
    by_index, listed = read_questions(file(CAPITAL | {"answer": 1}, CAPITAL | {"answer": ["Lutetia", "Paris"]}))
    assert by_index.answers == (" Rome",)
    assert listed.answers == (" Paris", " Lutetia")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("no json", "a JSON object on every line"),
        ("[1]", "a JSON object on every line, got list"),
        ({"answer": "x"}, "question or prompt must be given"),
        (CAPITAL | {"prompt": "x"}, "question or prompt must be given, and not both"),
        (CAPITAL | {"answer": "Berlin"}, "answer must be one of the choices, got 'Berlin'"),
        (CAPITAL | {"answer": 2}, "answer must be below the number of choices"),
        (CAPITAL | {"answer": []}, "answer must be a text, a list of texts or the index"),
        (CAPITAL | {"answer": True}, "answer must be a text"),
        ({"question": "x", "choices": ["a", "b"]}, r"answer must be .*got None"),
        (CAPITAL | {"answer": ["Paris", "Rome"]}, "one of the choices must be right, got 2"),
        (CAPITAL | {"choices": ["Paris"]}, "choices must be at least 2"),
        (CAPITAL | {"choices": ["Paris", "Paris"]}, "all different"),
        (CAPITAL | {"choices": "Paris"}, "choices must be a list"),
        (CAPITAL | {"hint": "x"}, "keys must be among"),
        (CAPITAL | {"question": " "}, "question must be a text that is not empty"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(file, entry, message):
    with pytest.raises(InputError, match=message) as error:
        read_questions(file(CAPITAL, entry))
    assert "line 2" in str(error.value)


def test_files_that_hold_nothing(file, tmp_path):
    with pytest.raises(InputError, match="hold at least one line"):
        read_questions(file("", "  "))
    with pytest.raises(InputError, match="be python or a JSON Lines file that exists"):
        read_questions(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="be UTF-8"):
        read_questions(tmp_path / "latin.jsonl")


def test_summaries(file):
    (item,) = read_summaries(file({"document": "Long.\n", "summary": " Short. "}))
    assert (item.document, item.prompt, item.reference) == ("Long.\n\n", "Summary:", " Short.")
    with pytest.raises(InputError, match="summary must be a text that is not empty"):
        read_summaries(file({"document": "Long."}))


def test_a_draw_is_the_same_for_the_same_seed():
    assert draw([1, 2, 3], 5, 0) == [1, 2, 3]
    assert draw(range(100), 5, 1) == draw(range(100), 5, 1) != draw(range(100), 5, 2)
