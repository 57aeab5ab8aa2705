"""Needles: prompts with a known place to look at, for telling which heads look there.

Paper: Wu et al. 2024 (retrieval heads), https://arxiv.org/abs/2404.15574, Sec. 2.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ...checks import check_choice, check_int, fail
from ...measure.prompts import TASKS
from ...measure.retrieval import build_prompt
from ...measure.tokens import encode, line_end_ids

DRAWS = 16
"""Prompts that are drawn for one whose needle lies near the depth wanted."""


@dataclass(frozen=True)
class Needle:
    """A prompt as token ids, the place ``[start, stop)`` of the needle in it, and the tokens of the answer."""

    ids: tuple[int, ...]
    start: int
    stop: int
    num_answer: int


def needle_prompts(
    tokenizer: PreTrainedTokenizerBase,
    filler: str,
    *,
    tasks: Sequence[str] = ("passkey", "key_value"),
    lengths: Sequence[int] = (1024, 2048, 4096),
    num_depths: int = 10,
    num_needles: int = 1,
    seed: int = 0,
) -> list[Needle]:
    """Prompts that hide a fact and ask for it, for every task, length and depth.

    Args:
        tokenizer: of the model.
        filler: the text that facts are hidden in.
        tasks: of `paucity.measure.prompts.TASKS`, with one needle each.
        lengths: tokens of a prompt and its answer.
        num_depths: depths, from the start of the text to its end.
        num_needles: facts for each of them.
        seed: of facts and texts.

    Raises:
        InputError: if a task is unknown or has several needles, or a length is too short or the filler too short.
    """
    function = "needle_prompts"
    rng, ids = random.Random(seed), encode(tokenizer, filler)
    ends, found = line_end_ids(tokenizer, ids), []
    check_int(function, "num_depths", num_depths)
    check_int(function, "num_needles", num_needles)
    for task in tasks:
        check_choice(function, "task", task, TASKS)
        for length in lengths:
            for depth in range(num_depths * num_needles):
                fact = TASKS[task](rng)
                if len(fact.needles) != 1:
                    raise fail(function, "task", "have one needle", task)
                wanted = (depth % num_depths + 0.5) / num_depths
                drawn = [build_prompt(tokenizer, fact, ids, length, rng, line_ends=ends) for _ in range(DRAWS)]
                best = min(drawn, key=lambda prompt: abs(prompt.depths[0] - wanted))
                start = round(best.depths[0] * len(best.ids))
                stop = start + len(encode(tokenizer, fact.needles[0]))
                found.append(Needle(best.ids, start, stop, len(best.answer_ids)))
    return found


def copy_prompts(
    tokens: Sequence[int],
    *,
    lengths: Sequence[int] = (1024, 2048, 4096),
    num_depths: int = 10,
    num_needles: int = 1,
    cue: int = 16,
    answer: int = 8,
    seed: int = 0,
) -> list[Needle]:
    """Texts with a stretch of text from elsewhere in them, the first tokens of which are given again at the end.

    Args:
        tokens: that texts and needles are cut out of.
        lengths: tokens of a prompt.
        num_depths: as in `needle_prompts`.
        num_needles: as there.
        cue: tokens of the needle that are given again.
        answer: tokens of it that should follow.
        seed: of needles and texts.

    Raises:
        InputError: if a length is too short for the needle, or there are too few tokens.
    """
    rng, size, found = random.Random(seed), cue + answer, []
    for length in lengths:
        room = length - size - cue
        if room < 0 or len(tokens) < room + size:
            wanted = f"be at least {size + cue} and at most {len(tokens) + cue}, as there are {len(tokens)} tokens"
            raise fail("copy_prompts", "length", wanted, length)
        for depth in range(num_depths * num_needles):
            begin = rng.randrange(len(tokens) - size + 1)
            needle, rest = tokens[begin : begin + size], [*tokens[:begin], *tokens[begin + size :]]
            first = rng.randrange(len(rest) - room + 1)
            text, start = rest[first : first + room], round((depth % num_depths + 0.5) / num_depths * room)
            found.append(Needle((*text[:start], *needle, *text[start:], *needle[:cue]), start, start + size, answer))
    return found
