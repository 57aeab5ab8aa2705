"""What a model knows and what it reads: questions answered with the book closed, and with the answer in the context.

Paper: Jaiswal et al. 2023 (LLM-KICK), https://arxiv.org/abs/2310.01382, Section 3: factoid questions in a closed book,
the same with the evidence in the prompt, and multiple choice. Choices are ranked by their likelihood after the prompt,
as in lm-eval's ``multiple_choice``; written answers are greedy and count when they begin with a right answer, whatever
its case. A judge model is not used anywhere.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checks import check_int, fail
from .questions import Question
from .retrieval import ANSWER_SLACK, Prompt, generate_answer
from .stats import Estimate, share_interval
from .tokens import Progress, context_length, device_of, encode, evaluating, forward, leading_ids


@dataclass(frozen=True)
class Answers:
    """How questions were answered.

    Attributes:
        accuracy: share that was right, with its interval.
        scores: 1 or 0 for each question, for paired comparisons.
        chance: share that guessing would get right; 0 where answers are written.
        given: what was answered.
    """

    accuracy: Estimate
    scores: tuple[float, ...]
    chance: float
    given: tuple[str, ...]


def multiple_choice(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    open_book: bool = False,
    per_byte: bool = False,
    batch_size: int = 32,
    on_progress: Progress | None = None,
) -> Answers:
    """The likeliest choice of each question.

    All choices of a question are scored from the same token on: the first in which any of them differs from the prompt.
    Only sequences of equal length share a batch, so that nothing is padded.

    Args:
        model: a causal language model of the transformers library.
        tokenizer: the model's.
        questions: each with choices.
        open_book: whether the context comes before the prompt.
        per_byte: rank by mean log-likelihood per UTF-8 byte of the choice instead of by the sum, for choices whose
            lengths differ much.
        batch_size: sequences in one forward pass.
        on_progress: called with (sequences done, sequences in all).

    Raises:
        InputError: if there are no questions, one has no choices or lacks its context, or is longer than the model's
            context; before the model runs.
    """
    check_int("multiple_choice", "batch_size", batch_size)
    check_questions("multiple_choice", model, tokenizer, questions, open_book=open_book, choices=True)
    rows: list[tuple[int, int, list[int], int]] = []  # question, choice, ids, first scored
    for number, question in enumerate(questions):
        sequences, start = _sequences(tokenizer, question, open_book)
        rows += [(number, choice, ids, start) for choice, ids in enumerate(sequences)]
    rows.sort(key=lambda row: len(row[2]))
    likelihood: dict[tuple[int, int], float] = {}
    with evaluating(model):
        while len(likelihood) < len(rows):
            batch = rows[len(likelihood) : len(likelihood) + batch_size]
            batch = [row for row in batch if len(row[2]) == len(batch[0][2])]
            ids = torch.tensor([row[2] for row in batch], device=device_of(model))
            keep = ids.shape[1] - min(row[3] for row in batch)
            logits, _ = forward(model, ids[:, :-1], keep=keep)
            wanted = ids[:, -keep:, None]
            logp = logits.float().log_softmax(-1).gather(-1, wanted)[..., 0]
            for row, found in zip(batch, logp, strict=True):
                likelihood[row[:2]] = float(found[row[3] - ids.shape[1] :].sum())
            if on_progress is not None:
                on_progress(len(likelihood), len(rows))
    given = []
    for number, question in enumerate(questions):
        sizes = [len(choice.encode()) if per_byte else 1 for choice in question.choices]
        ranked = [likelihood[number, choice] / size for choice, size in enumerate(sizes)]
        known = not any(math.isnan(value) for value in ranked)
        given.append(question.choices[ranked.index(max(ranked))] if known else "")
    scores = tuple(float(text in q.answers) for text, q in zip(given, questions, strict=True))
    chance = sum(sum(c in q.answers for c in q.choices) / len(q.choices) for q in questions) / len(questions)
    return Answers(share_interval(scores), scores, chance, tuple(given))


def written_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    open_book: bool = False,
    on_progress: Progress | None = None,
) -> Answers:
    """Greedy answers; one is right when the text begins with a right answer as a whole word.

    Args:
        model: a causal language model of the transformers library.
        tokenizer: the model's.
        questions: what to ask; choices are not looked at.
        open_book: whether the context comes before the prompt.
        on_progress: called with (questions done, questions in all).

    Raises:
        InputError: as `multiple_choice`.
    """
    check_questions("written_answers", model, tokenizer, questions, open_book=open_book, choices=False)
    given = []
    with evaluating(model):
        for done, question in enumerate(questions, 1):
            ids = prompt_ids(tokenizer, question.text(open_book=open_book))
            longest = max((encode(tokenizer, answer) for answer in question.answers), key=len)
            given.append(generate_answer(model, tokenizer, Prompt(tuple(ids), tuple(longest), question.answers, ())))
            if on_progress is not None:
                on_progress(done, len(questions))
    scores = tuple(float(is_right(text, q.answers)) for text, q in zip(given, questions, strict=True))
    return Answers(share_interval(scores), scores, 0.0, tuple(given))


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether ``text`` begins with one of the answers as a whole word; case and white space around do not count.

    >>> is_right(" Paris, of course", ["paris"]), is_right("Parisian", ["Paris"]), is_right("os.path", ["os"])
    (True, False, False)
    """
    begins = (rf"{re.escape(answer.strip())}(?!\w|\.\w)" for answer in answers)
    return any(re.match(pattern, text.strip(), re.IGNORECASE) for pattern in begins)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of ``text`` after what the tokenizer puts before one."""
    return [*leading_ids(tokenizer), *encode(tokenizer, text)]


def question_length(tokenizer: PreTrainedTokenizerBase, question: Question, *, open_book: bool) -> int:
    """Tokens of a question with its longest answer, and a few more for writing one."""
    longest = max(len(encode(tokenizer, text)) for text in (*question.answers, *question.choices))
    return len(prompt_ids(tokenizer, question.text(open_book=open_book))) + longest + ANSWER_SLACK


def check_questions(
    function: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    open_book: bool,
    choices: bool,
) -> None:
    """Refuse questions that cannot be asked; see `multiple_choice`."""
    if not questions:
        raise fail(function, "questions", "hold at least one question", "none")
    limit = context_length(model)
    for number, question in enumerate(questions, 1):
        if choices and len(question.choices) < 2:
            raise fail(function, "choices", "be at least 2", f"{len(question.choices)} in question {number}")
        if open_book and not question.context:
            raise fail(function, "context", "be given for an open book", f"none in question {number}")
        if not prompt_ids(tokenizer, question.text(open_book=open_book)):
            raise fail(function, "prompt", "have at least one token", f"none in question {number}")
        size = question_length(tokenizer, question, open_book=open_book)
        if limit is not None and size > limit:
            got = f"{size} in question {number}"
            raise fail(function, "prompt", f"fit with its answer into the model's context of {limit} tokens", got)


def _sequences(tokenizer: PreTrainedTokenizerBase, question: Question, open_book: bool) -> tuple[list[list[int]], int]:
    """Ids of the prompt with each choice, and the first index that is scored."""
    text = question.text(open_book=open_book)
    prompt = prompt_ids(tokenizer, text)
    whole = [prompt_ids(tokenizer, text + choice) for choice in question.choices]
    start = len(prompt)
    for ids in whole:
        same = next(
            (i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), min(len(ids), len(prompt))
        )
        start = min(start, same, len(ids) - 1)
    return whole, max(start, 1)
