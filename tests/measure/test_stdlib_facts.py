import pytest

from paucity.checks import InputError
from paucity.measure import stdlib_facts
from paucity.measure.stdlib_facts import next_lines, python_facts
from paucity.measure.stdlib_summaries import python_summaries

READ = """
import os
import sys
import socket
from grp import getgrnam
from pwd import getpwnam
from abc import ABC
from bdb import Bdb
from ast import *

class First(Base):
    def set_first(self, value): os.path, os.sep, sys.argv, socket.SOCK
class Second(Other): ...
class Third(Last): ...
class Fourth(Rest): ...
""" + "\n".join("os.path, os.sep, sys.argv, socket.SOCK, sys.exit, socket.INET" for _ in range(4))
HELD = "import os\nclass Mine(Thing):\n    def go(self, there): os.path\ndef run(): ...\nclass Yours(Thong): ...\n"
HELD += "class His(Thang): ...\nclass Hers(Theng): ...\ndef walk(): ...\ndef stop(): ...\n"


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(stdlib_facts, "python_documents", lambda **_: [READ, "not python ("])
    monkeypatch.setattr(
        stdlib_facts,
        "held_out_modules",
        lambda: {"mine": HELD, "theirs": "def sit(): ...\ndef stand(): ...\ndef lie(): ...\n"},
    )
    stdlib_facts._library.cache_clear()
    yield
    stdlib_facts._library.cache_clear()


@pytest.mark.usefixtures("library")
def test_known_facts_stand_in_the_library_as_often_as_asked():
    facts = {(q.prompt.strip(), q.answers[0]): q for q in python_facts(100, min_count=1)}
    assert ("class First(", "Base") in facts
    assert ("from grp import", " getgrnam") in facts
    assert not any(answer == " *" for _, answer in facts)
    often = {(q.prompt.strip(), q.answers[0]) for q in python_facts(100, min_count=4)}
    members = {"os.": ("path", "sep"), "sys.": ("argv", "exit"), "socket.": ("SOCK", "INET")}
    assert often == {(prompt, name) for prompt, names in members.items() for name in names}
    assert facts["os.", "sep"].answers == ("sep", "path")
    for question in facts.values():
        assert set(question.answers) & set(question.choices) == {question.answers[0]}
        assert len(set(question.choices)) == 4
        assert question.answers[0].strip() in question.context


@pytest.mark.usefixtures("library")
def test_the_control_holds_what_stands_nowhere_else():
    control = {(q.prompt.strip(), q.answers[0]) for q in python_facts(100, known=False)}
    assert ("class Mine(", "Thing") in control
    assert ("mine.", "walk") in control
    assert ("os.", "path") not in control


@pytest.mark.usefixtures("library")
def test_the_same_seed_draws_the_same_and_nothing_is_said():
    assert python_facts(5, min_count=1) == python_facts(5, min_count=1) != python_facts(5, min_count=1, seed=1)
    with pytest.raises(InputError, match="min_count must leave at least one fact"):
        python_facts(5, min_count=1000)
    with pytest.raises(InputError, match="num must be"):
        python_facts(0)


def test_next_lines_stand_in_the_modules():
    for question in next_lines(20):
        right = question.answers[0]
        assert right in question.choices
        assert len({len(choice) - len(choice.lstrip()) for choice in question.choices}) == 1
        assert question.prompt.endswith("\n")
        assert right not in question.prompt.splitlines()


def test_summaries_are_not_in_the_prompt_and_outlines_are_in_the_document():
    for item in python_summaries("outlines", 30):
        assert all(line in item.document for line in item.reference.splitlines())
        assert len(item.reference.splitlines()) > 1
        assert item.document.startswith(item.prompt.splitlines()[1])
    for item in python_summaries("docstrings", 200):
        assert item.reference not in item.document + item.prompt
        assert item.prompt.endswith('"""')
    with pytest.raises(InputError, match="kind must be"):
        python_summaries("poems", 3)
