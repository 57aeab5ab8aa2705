"""What a model still knows of a prompt once the prompt is cached: facts hidden in it, and how its text goes on."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checks import check_choice, check_int, fail
from .prompts import TASKS
from .retrieval import build_prompt
from .tokens import device_of, encode, evaluating, forward, leading_ids, line_end_ids


@dataclass(frozen=True)
class Case:
    """A prompt, which is read first, and what follows.

    Attributes:
        prompt: token ids that fill the cache.
        rest: token ids after that.
        num_scored: how many of the rest, the last ones, are to be predicted.
        num_bytes: of the text of these.
    """

    prompt: tuple[int, ...]
    rest: tuple[int, ...]
    num_scored: int
    num_bytes: int


class Outcome(NamedTuple):
    """Whether every scored token was the likeliest, and minus the logarithm (base 2) of their probability, in bits."""

    right: bool
    bits: float


def retrieval_cases(
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
    length: int,
    filler: str,
    num_prompts: int,
    seed: int = 0,
    ask_later: bool = False,
) -> list[Case]:
    """Prompts with hidden facts; the answer is scored.

    Args:
        tokenizer: the model's.
        task: one of `paucity.measure.prompts.TASKS`.
        length: tokens of text, question and answer together.
        filler: the haystack.
        num_prompts: cases.
        seed: of facts, stretches and depths.
        ask_later: whether the question comes after the prompt instead of at its end.
    """
    check_choice("retrieval_cases", "task", task, TASKS)
    check_int("retrieval_cases", "num_prompts", num_prompts)
    rng, filler_ids = random.Random(seed), encode(tokenizer, filler)
    ends, cases = line_end_ids(tokenizer, filler_ids), []
    for _ in range(num_prompts):
        fact = TASKS[task](rng)
        built = build_prompt(tokenizer, fact, filler_ids, length, rng, line_ends=ends)
        later = len(encode(tokenizer, "\n" + fact.question)) if ask_later else 0
        cut = len(built.ids) - later
        rest = (*built.ids[cut:], *built.answer_ids)
        cases.append(Case(built.ids[:cut], rest, len(built.answer_ids), len(" " + ", ".join(fact.answers))))
    return cases


def continuation_cases(
    tokenizer: PreTrainedTokenizerBase, text: str, *, length: int, num_tokens: int, num_texts: int
) -> list[Case]:
    """Stretches of ``text``, one after the other: ``length`` tokens of prompt, and ``num_tokens`` more to predict.

    Raises:
        InputError: if the text is too short.
    """
    ids, lead = encode(tokenizer, text), leading_ids(tokenizer)
    each = length - len(lead) + num_tokens
    if len(ids) < each * num_texts:
        raise fail("continuation_cases", "text", f"have at least {each * num_texts} tokens", len(ids))
    cases = []
    for start in range(0, each * num_texts, each):
        stretch = ids[start : start + each]
        prompt, rest = (*lead, *stretch[:-num_tokens]), tuple(stretch[-num_tokens:])
        cases.append(Case(prompt, rest, num_tokens, len(str(tokenizer.decode(rest)).encode())))
    return cases


def after_prompt(model: nn.Module, cases: Sequence[Case]) -> list[Outcome]:
    """Read each prompt, then the rest in one go, with whatever policies the model carries.

    Args:
        model: a causal language model of the transformers library.
        cases: as `retrieval_cases` or `continuation_cases` makes them.
    """
    outcomes, device = [], device_of(model)
    with evaluating(model):
        for case in cases:
            cache: Any
            last, cache = forward(model, torch.tensor([case.prompt], device=device), keep=1, use_cache=True)
            rest = torch.tensor([case.rest], device=device)
            logits = last
            if rest.shape[1] > 1:
                later, _ = forward(model, rest[:, :-1], keep=rest.shape[1] - 1, cache=cache, use_cache=True)
                logits = torch.cat([last, later], dim=1)
            logits, wanted = logits[0, -case.num_scored :].float(), rest[0, -case.num_scored :]
            nats = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
            right = bool((logits.argmax(-1) == wanted).all())
            outcomes.append(Outcome(right, float(nats) / math.log(2)))
    return outcomes
