import random

import pytest

from paucity.checks import InputError
from paucity.measure.prompts import (
    DIRECTIONS,
    TASKS,
    copying,
    interleave,
    key_value,
    multi_value,
    scatter,
    threading,
    variable_tracking,
)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(20))
def test_answers_stand_in_the_needles_alone(task, seed):
    fact = TASKS[task](random.Random(seed))
    assert fact == TASKS[task](random.Random(seed))
    assert fact != TASKS[task](random.Random(seed + 1000))
    assert all(line.endswith("\n") for line in (*fact.needles, *fact.distractors))
    for answer in fact.answers:
        assert any(answer in needle for needle in fact.needles)
        assert not any(answer in line for line in fact.distractors)
        assert answer not in fact.question


def test_sizes():
    rng = random.Random(0)
    fact = key_value(rng, num_keys=7)
    assert len({line.removesuffix(".\n").split(" is ")[0] for line in (*fact.needles, *fact.distractors)}) == 7
    assert len(multi_value(rng, num_values=4, num_keys=2).answers) == 4
    fact = variable_tracking(rng, num_hops=3, num_chains=2)
    assert (len(fact.needles), len(fact.distractors), len(fact.answers)) == (4, 4, 4)


def test_the_chain_holds_the_number():
    fact = variable_tracking(random.Random(1))
    number = fact.question.split(" hold ")[1].split("?")[0]
    values: dict[str, str] = {}
    for line in (*fact.distractors, *fact.needles):
        name, value = line.removeprefix("VAR ").removesuffix("\n").split(" = ")
        value = value.removeprefix("VAR ")
        values[name] = values.get(value, value)
    assert tuple(name for name, value in values.items() if value == number) == fact.answers


def test_formats_are_those_of_training():
    passkey = TASKS["passkey"](random.Random(0))
    number = passkey.answers[0]
    assert passkey.needles == (f"The pass key is {number}. Remember it. {number} is the pass key.\n",)
    assert passkey.question == "What is the pass key? The pass key is"
    assert TASKS["multi_value"](random.Random(0)).needles[0].startswith("One magic number for ")


@pytest.mark.parametrize("seed", range(20))
def test_scatter(seed):
    filler = [1, 2, 9, 3, 9, 4, 5, 9, 6]
    lines = [[-1, -1], [-2], [-3]]
    out = scatter(filler, lines, random.Random(seed), line_ends={9})
    assert [i for i in out if i > 0] == filler
    assert [i for i in out if i < 0] == [-1, -1, -2, -3]
    assert all(i == 0 or out[i - 1] == 9 or out[i - 1] < 0 for i, token in enumerate(out) if token < 0)
    anywhere = scatter([1, 2, 3], lines, random.Random(seed), line_ends={9})
    assert [i for i in anywhere if i > 0] == [1, 2, 3]
    assert scatter([], lines, random.Random(seed)) == [-1, -1, -2, -3]


def test_scatter_reaches_every_depth():
    places = {scatter([1, 2, 3], [[0]], random.Random(seed)).index(0) for seed in range(60)}
    assert places == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", range(10))
def test_interleave_keeps_the_order_of_needles(seed):
    fact = TASKS["variable_tracking"](random.Random(seed))
    lines = interleave(fact, random.Random(seed))
    assert sorted(lines) == sorted(fact.needles + fact.distractors)
    assert [line for line in lines if line in fact.needles] == list(fact.needles)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_following_a_thread_by_hand_gives_its_answer(direction, num_steps):
    fact = threading(random.Random(3), num_steps=num_steps, num_threads=4, direction=direction)
    lines = [*fact.needles, *fact.distractors]
    following = dict(line.removeprefix("The magic number for ").removesuffix(".\n").split(" is ") for line in lines)
    assert len(following) == len(lines) == 4 * num_steps  # no key comes twice
    at = fact.question.removesuffix(" is").rpartition(" from ")[2]
    places = []
    for _ in range(num_steps):
        places.append(fact.needles.index(f"The magic number for {at} is {following[at]}.\n"))
        at = following[at]
    assert (at,) == fact.answers
    assert at not in following
    if direction != "random":
        assert places == sorted(places, reverse=direction == "backward")


def test_words_to_copy_follow_the_question_in_the_text():
    fact = copying(random.Random(0), num_words=7)
    assert len(fact.answers[0].split()) == 7
    assert fact.needles == (f"The words are {fact.answers[0]}.\n",)
    assert fact.verbatim
    assert fact.question.endswith("The words are")


def test_bad_sizes():
    with pytest.raises(InputError, match="num_steps must be at least 1, got 0"):
        threading(random.Random(0), num_steps=0)
    with pytest.raises(InputError, match="direction must be one of backward, forward, random, got up"):
        threading(random.Random(0), direction="up")
    with pytest.raises(InputError, match="num_words must be at least 1"):
        copying(random.Random(0), num_words=0)
