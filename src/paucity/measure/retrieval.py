"""Retrieval from context: facts hidden in a long text, and a question about them.

Paper: Hsieh et al. 2024 (RULER), https://arxiv.org/abs/2404.06654: one answer counts when it is given exactly, several
by the share of them found in the output, one to be copied by the share of its tokens that are right. The haystack is
the caller's text instead of essays, and only the tasks of `paucity.measure.prompts` are here (no common-word or
question-answering tasks).
"""

import random
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..checks import InputTypeError, check_choice, check_int, fail
from .prompts import TASKS, Fact, interleave, scatter
from .stats import Estimate, share_interval
from .tokens import Progress, check_context, device_of, encode, evaluating, forward, leading_ids, line_end_ids

MODES = ("generate", "teacher_forced")
ANSWER_SLACK = 4
"""Tokens left after the expected answer, for a tokenizer that writes it otherwise and to see where a number ends."""

NUM_DEPTHS = 5


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, with what should follow.

    Attributes:
        ids: token ids of the prompt, special tokens before the text included.
        answer_ids: token ids of the answers as text: a space, then the answers separated by commas.
        answers: the answers expected.
        depths: where each needle starts, as a fraction of the prompt; 0 is its start.
        verbatim: whether the answer is graded token by token.
        answer_ends: how many of ``answer_ids`` there are up to the end of each answer.
    """

    ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    verbatim: bool = False
    answer_ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class DepthAccuracy:
    """Accuracy over the prompts whose needle starts at a depth of ``low`` to ``high``."""

    low: float
    high: float
    accuracy: Estimate


@dataclass(frozen=True)
class Retrieval:
    """Accuracy of one task at one length; ``scores`` has one figure in [0, 1] for each prompt, for paired comparisons.

    ``by_depth`` is empty for tasks with more than one needle, and leaves out depths that no prompt has.
    """

    task: str
    length: int
    num_prompts: int
    seed: int
    mode: str
    accuracy: Estimate
    by_depth: tuple[DepthAccuracy, ...]
    scores: tuple[float, ...]


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    fact: Fact,
    filler_ids: Sequence[int],
    length: int,
    rng: random.Random,
    *,
    line_ends: Container[int] | None = None,
) -> Prompt:
    """A prompt that, with room for the answer, is exactly ``length`` tokens long.

    It is what the tokenizer puts before a text, a random stretch of the filler with the lines of the fact inserted,
    a line feed and the question.

    Args:
        tokenizer: any Hugging Face tokenizer.
        fact: what to hide and to ask.
        filler_ids: token ids of the haystack.
        length: tokens of prompt and answer together.
        rng: of the order of the lines, the stretch and the depths.
        line_ends: ids after which a line may be inserted; found by decoding ``filler_ids`` when None.

    Raises:
        InputError: if ``length`` is too short for the fact (it names the length needed), or the filler too short.
    """
    check_int("build_prompt", "length", length)
    needles = set(fact.needles)
    texts = interleave(fact, rng)
    lines = [encode(tokenizer, text) for text in texts]
    lead, question, answer = leading_ids(tokenizer), "\n" + fact.question, " " + ", ".join(fact.answers)
    tail, whole = encode(tokenizer, question), encode(tokenizer, question + answer)
    joined = whole[: len(tail)] == tail and len(whole) > len(tail)
    answer_ids = whole[len(tail) :] if joined else encode(tokenizer, answer)
    fixed = len(lead) + sum(map(len, lines)) + len(tail) + len(answer_ids) + ANSWER_SLACK
    room = length - fixed
    if room < 0:
        raise fail("build_prompt", "length", f"be at least {fixed} for this fact", length)
    if room > len(filler_ids):
        raise fail("build_prompt", "filler", f"have at least {room} tokens", len(filler_ids))
    start = rng.randint(0, len(filler_ids) - room)
    window = list(filler_ids[start : start + room])
    ends = line_end_ids(tokenizer, window) if line_ends is None else line_ends
    # Each line is placed as one negative id first, so that where it went is known.
    body = scatter(window, [[-1 - i] for i in range(len(lines))], rng, line_ends=ends)
    ids, places = list(lead), []
    for token in body:
        if token < 0:
            if texts[-1 - token] in needles:
                places.append(len(ids))
            ids += lines[-1 - token]
        else:
            ids.append(token)
    ids += tail
    depths = tuple(place / len(ids) for place in places)
    ends_at = _answer_ends(tokenizer, answer_ids, fact.answers)
    return Prompt(tuple(ids), tuple(answer_ids), fact.answers, depths, fact.verbatim, ends_at)


def _answer_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], answers: Sequence[str]) -> tuple[int, ...]:
    """Tokens up to the end of each answer: the fewest whose text ends no earlier."""
    texts = [" " + ", ".join(answers[: i + 1]) for i in range(len(answers))]
    written = [len(tokenizer.decode(ids[: n + 1])) for n in range(len(ids))]
    return tuple(next((n for n, size in enumerate(written, 1) if size >= len(text)), len(ids)) for text in texts)


def retrieval_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
    length: int,
    filler: str,
    num_prompts: int = 100,
    seed: int = 0,
    mode: str = "generate",
    on_progress: Progress | None = None,
) -> Retrieval:
    """Accuracy of ``task`` in prompts of ``length`` tokens, greedy.

    Args:
        model: a causal language model of the transformers library.
        tokenizer: the model's.
        task: one of `paucity.measure.prompts.TASKS`.
        length: tokens of a prompt and its answer together.
        filler: the haystack; each prompt takes a random stretch of it.
        num_prompts: prompts to answer.
        seed: of facts, stretches and depths; the same seed gives every model the same prompts.
        mode: "generate" decodes with ``model.generate``, prefill and cached steps as in use, and compares text;
            "teacher_forced" runs one forward pass over prompt and answers and counts those answers of which every token
            is the likeliest, given the answers before. That is faster, equal for a model that writes one answer in the
            expected form, and never exercises the cache. A verbatim answer counts by its tokens in both, so an early
            mistake costs more when the model decodes.
        on_progress: called with (prompts done, ``num_prompts``).

    Raises:
        InputError: if ``task`` or ``mode`` is unknown, or ``length`` too short for the facts, too long for the filler
            or beyond the model's context; all prompts are built before the model runs.
    """
    function = "retrieval_accuracy"
    check_choice(function, "task", task, TASKS)
    check_choice(function, "mode", mode, MODES)
    check_int(function, "length", length)
    check_int(function, "num_prompts", num_prompts)
    check_context(function, "length", model, length)
    if not isinstance(filler, str):
        raise InputTypeError(f"{function}: filler must be a string, got {type(filler).__name__}.")
    prompts = build_prompts(tokenizer, task=task, length=length, filler=filler, num_prompts=num_prompts, seed=seed)
    scores = []
    with evaluating(model):
        for done, prompt in enumerate(prompts, 1):
            scores.append(_generated(model, tokenizer, prompt) if mode == "generate" else _forced(model, prompt))
            if on_progress is not None:
                on_progress(done, num_prompts)
    by_depth = _by_depth(prompts, scores) if all(len(prompt.depths) == 1 for prompt in prompts) else ()
    return Retrieval(task, length, num_prompts, seed, mode, share_interval(scores), by_depth, tuple(scores))


def build_prompts(
    tokenizer: PreTrainedTokenizerBase, *, task: str, length: int, filler: str, num_prompts: int, seed: int = 0
) -> list[Prompt]:
    """The prompts of `retrieval_accuracy`.

    Raises:
        InputError: if ``length`` is too short for the facts or too long for the filler.
    """
    rng, filler_ids = random.Random(seed), encode(tokenizer, filler)
    ends = line_end_ids(tokenizer, filler_ids)
    return [
        build_prompt(tokenizer, TASKS[task](rng), filler_ids, length, rng, line_ends=ends) for _ in range(num_prompts)
    ]


def answer_score(output: str, answers: Sequence[str]) -> float:
    """For one answer, 1 if it is the first word of ``output``; for several, the share that are words of it."""
    words = re.findall(r"\w+", output)
    if len(answers) == 1:
        return float(words[:1] == list(answers))
    return sum(answer in words for answer in answers) / len(answers)


def generate_answer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Text that greedy decoding puts after the prompt, a few tokens longer than the answer expected."""
    text: str = tokenizer.decode(_generate(model, tokenizer, prompt), skip_special_tokens=True)
    return text


def _generate(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    ids = torch.tensor([prompt.ids], device=device_of(model))
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    config = GenerationConfig(
        max_new_tokens=len(prompt.answer_ids) + ANSWER_SLACK, do_sample=False, num_beams=1, pad_token_id=pad
    )
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)  # type: ignore[operator]
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


def _generated(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> float:
    if not prompt.verbatim:
        return answer_score(generate_answer(model, tokenizer, prompt), prompt.answers)
    right = zip(_generate(model, tokenizer, prompt), prompt.answer_ids, strict=False)
    return sum(new == wanted for new, wanted in right) / len(prompt.answer_ids)


def _forced(model: nn.Module, prompt: Prompt) -> float:
    ids = torch.tensor([[*prompt.ids, *prompt.answer_ids]], device=device_of(model))
    count = len(prompt.answer_ids)
    logits, _ = forward(model, ids[:, :-1], keep=count)
    right: list[bool] = (logits[0].argmax(-1) == ids[0, -count:]).tolist()
    if prompt.verbatim:
        return sum(right) / count
    return sum(all(right[a:b]) for a, b in pairwise((0, *prompt.answer_ends))) / len(prompt.answers)


def _by_depth(prompts: Sequence[Prompt], scores: Sequence[float]) -> tuple[DepthAccuracy, ...]:
    bins: list[list[float]] = [[] for _ in range(NUM_DEPTHS)]
    for prompt, score in zip(prompts, scores, strict=True):
        bins[min(int(prompt.depths[0] * NUM_DEPTHS), NUM_DEPTHS - 1)].append(score)
    return tuple(
        DepthAccuracy(i / NUM_DEPTHS, (i + 1) / NUM_DEPTHS, share_interval(found))
        for i, found in enumerate(bins)
        if found
    )
