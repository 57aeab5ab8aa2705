"""Questions with known answers and documents with reference summaries, from JSON Lines files of the user.

A line of a file of questions is an object with ``answer`` (a text, a list of texts that are all right, or the index of
a choice) and either ``question`` (asked as ``Question: ... Answer:``) or ``prompt`` (text that the answer follows as it
stands); ``choices`` and ``context`` may be added. A line of a file of documents has ``document`` and ``summary``.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..checks import InputError, fail

_KEYS = {"question", "prompt", "answer", "choices", "context"}
_SUMMARY_KEYS = {"document", "summary"}
Item = TypeVar("Item")


@dataclass(frozen=True)
class Question:
    """What is asked and what is right.

    Attributes:
        prompt: text that an answer follows directly; it ends where the answer begins.
        answers: every text that counts as right; the first is the one among the choices.
        choices: what is chosen from, ``answers[0]`` among them; empty where the answer is written only.
        context: text in which the answer stands, put before the prompt in an open book.
    """

    prompt: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    context: str = ""

    def text(self, *, open_book: bool) -> str:
        """The prompt, with the context before it in an open book."""
        return f"{self.context}\n{self.prompt}" if open_book and self.context else self.prompt


@dataclass(frozen=True)
class Summary:
    """A document, the text that asks for its summary, and the reference that follows that text directly.

    What a model writes ends at the first of the ``stops``.
    """

    document: str
    prompt: str
    reference: str
    stops: tuple[str, ...] = ("\n",)


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a JSON Lines file.

    Raises:
        InputError: with the line, if the file is absent or empty, or a line is no question.
    """
    return [_question(entry, where) for where, entry in _lines(path, "read_questions")]


def read_summaries(path: str | Path) -> list[Summary]:
    """The documents and summaries of a JSON Lines file.

    Raises:
        InputError: with the line, if the file is absent or empty, or a line lacks a text.
    """
    found = []
    for where, entry in _lines(path, "read_summaries"):
        _check_keys("read_summaries", where, entry, _SUMMARY_KEYS)
        document, summary = (_text("read_summaries", where, entry, key) for key in ("document", "summary"))
        found.append(Summary(document.rstrip() + "\n\n", "Summary:", " " + summary.strip()))
    return found


def draw(items: Sequence[Item], num: int, seed: int) -> list[Item]:
    """``num`` of the items, or all in their order where there are no more; the same ones for the same seed."""
    return list(items) if len(items) <= num else random.Random(seed).sample(list(items), num)


def _lines(path: str | Path, function: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(path).expanduser()
    if not path.is_file():
        raise fail(function, "path", "be python or a JSON Lines file that exists", path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise fail(function, "path", "be UTF-8", path) from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise fail(function, "path", "hold at least one line", f"{path}, which is empty")
    for number, line in numbered:
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError:
            raise fail(function, "path", "hold a JSON object on every line", f"something else ({where})") from None
        if not isinstance(entry, dict):
            raise fail(function, "path", "hold a JSON object on every line", f"{type(entry).__name__} ({where})")
        yield where, entry


def _check_keys(function: str, where: str, entry: dict[str, Any], known: set[str]) -> None:
    for key in entry:
        if key not in known:
            raise fail(function, "keys", f"be among {', '.join(sorted(known))}", f"{key} ({where})")


def _text(function: str, where: str, entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise fail(function, key, "be a text that is not empty", f"{value!r} ({where})")
    return value


def _question(entry: dict[str, Any], where: str) -> Question:
    function = "read_questions"
    _check_keys(function, where, entry, _KEYS)
    if ("question" in entry) == ("prompt" in entry):
        raise fail(function, "question or prompt", "be given, and not both", where)
    asked = "question" in entry
    text = _text(function, where, entry, "question" if asked else "prompt")
    lead = " " if asked else ""
    choices = entry.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise fail(function, "choices", "be a list of texts", f"{choices!r} ({where})")
    if choices and (len(choices) < 2 or len(set(choices)) < len(choices)):
        raise fail(function, "choices", "be at least 2, all different", f"{choices!r} ({where})")
    answers = _answers(entry, choices, where)
    if choices and answers[0] not in choices:
        raise fail(function, "answer", "be one of the choices", f"{answers[0]!r} ({where})")
    context = _text(function, where, entry, "context") if "context" in entry else ""
    prompt = f"Question: {text.strip()}\nAnswer:" if asked else text
    return Question(prompt, tuple(lead + a for a in answers), tuple(lead + c for c in choices), context)


def _answers(entry: dict[str, Any], choices: list[str], where: str) -> list[str]:
    answer = entry.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise fail(
                "read_questions", "answer", f"be below the number of choices ({len(choices)})", f"{answer} ({where})"
            )
        return [choices[answer]]
    found = [answer] if isinstance(answer, str) else answer
    if not isinstance(found, list) or not found or not all(isinstance(a, str) and a.strip() for a in found):
        raise fail(
            "read_questions", "answer", "be a text, a list of texts or the index of a choice", f"{answer!r} ({where})"
        )
    listed = [a for a in found if a in choices]
    if len(listed) > 1:
        raise InputError(f"read_questions: one of the choices must be right, got {len(listed)} ({where}).")
    return [*listed, *(a for a in found if a not in listed)]
