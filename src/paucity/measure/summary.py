"""Summaries without a judge: what a document tells a model about its summary, and what the model writes of it.

Paper: Jaiswal et al. 2023 (LLM-KICK), https://arxiv.org/abs/2310.01382, has summaries judged by GPT-4. Here no other
model is asked. The gain is how many bits per byte of a reference summary the document saves: a model that does not read
it gains nothing. What is written greedily is compared with the reference, and with what another model wrote, by ROUGE-L
(Lin 2004, https://aclanthology.org/W04-1013). Neither says whether a summary is good: they say whether the document is
still used, and how far the words have moved.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checks import fail
from .knowledge import prompt_ids
from .questions import Summary
from .retrieval import ANSWER_SLACK, Prompt, generate_answer
from .stats import Estimate, mean_interval, ratio_interval
from .tokens import Progress, context_length, device_of, encode, evaluating, forward


@dataclass(frozen=True)
class Summaries:
    """How documents were summarised.

    Attributes:
        gain: bits per byte of the references that the documents save.
        rouge: mean ROUGE-L of what was written against the references; None where nothing was.
        bits: of each reference, (without, with) its document before it.
        num_bytes: of each reference.
        scores: ROUGE-L of each.
        written: what was written, up to the first stop.
    """

    gain: Estimate
    rouge: Estimate | None
    bits: tuple[tuple[float, float], ...]
    num_bytes: tuple[int, ...]
    scores: tuple[float, ...]
    written: tuple[str, ...]


def summarise(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    summaries: Sequence[Summary],
    *,
    write: bool = True,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Summaries:
    """Predict the reference of each document with and without it, and write a summary.

    Args:
        model: a causal language model of the transformers library.
        tokenizer: the model's.
        summaries: documents with references.
        write: whether summaries are written; without, only their likelihood is measured, which is far faster.
        seed: of the bootstrap over documents.
        on_progress: called with (documents done, documents in all).

    Raises:
        InputError: if there are none, or one is longer than the model's context; before the model runs.
    """
    check_summaries("summarise", model, tokenizer, summaries)
    bits, written = [], []
    with evaluating(model):
        for done, item in enumerate(summaries, 1):
            texts = (item.prompt, item.document + item.prompt)
            without, given = (_bits(model, tokenizer, text, item.reference) for text in texts)
            bits.append((without, given))
            if write:
                answer = Prompt(
                    tuple(prompt_ids(tokenizer, texts[1])), tuple(encode(tokenizer, item.reference)), (), ()
                )
                text = generate_answer(model, tokenizer, answer)
                written.append(text[: min(at if (at := text.find(stop)) >= 0 else len(text) for stop in item.stops)])
            if on_progress is not None:
                on_progress(done, len(summaries))
    sizes = tuple(len(item.reference.encode()) for item in summaries)
    scores = tuple(rouge_l(text, item.reference) for text, item in zip(written, summaries, strict=write))
    gain = ratio_interval([without - given for without, given in bits], sizes, seed=seed)
    return Summaries(
        gain, mean_interval(scores, seed=seed) if write else None, tuple(bits), sizes, scores, tuple(written)
    )


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of the words, in lower case; 1 where both have no words.

    >>> rouge_l("the cat sat", "a cat sat down")
    0.5714285714285714
    """
    ours, theirs = (re.findall(r"\w+", side.lower()) for side in (text, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    best = [0] * (len(theirs) + 1)
    for word in ours:
        last = best[:]
        for at, other in enumerate(theirs, 1):
            best[at] = last[at - 1] + 1 if word == other else max(last[at], best[at - 1])
    return 2 * best[-1] / (len(ours) + len(theirs))


def summary_length(tokenizer: PreTrainedTokenizerBase, item: Summary) -> int:
    """Tokens of a document with its summary, and a few more for writing one."""
    return len(prompt_ids(tokenizer, item.document + item.prompt + item.reference)) + ANSWER_SLACK + 1


def check_summaries(
    function: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, summaries: Sequence[Summary]
) -> None:
    """Refuse documents that cannot be read; see `summarise`."""
    if not summaries:
        raise fail(function, "summaries", "hold at least one document", "none")
    limit = context_length(model)
    for number, item in enumerate(summaries, 1):
        if not item.stops:
            raise fail(function, "stops", "hold at least one text", f"none in document {number}")
        size = summary_length(tokenizer, item)
        if limit is not None and size > limit:
            got = f"{size} in document {number}"
            raise fail(function, "document", f"fit with its summary into the model's context of {limit} tokens", got)


def _bits(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, reference: str) -> float:
    """Bits of ``reference`` after ``text``; tokens that reach over the seam are counted whole in both cases."""
    before, whole = prompt_ids(tokenizer, text), prompt_ids(tokenizer, text + reference)
    same = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    keep = len(whole) - max(1, min(same, len(whole) - 1))
    ids = torch.tensor([whole], device=device_of(model))
    logits, _ = forward(model, ids[:, :-1], keep=keep)
    loss = nn.functional.cross_entropy(logits[0].float(), ids[0, -keep:], reduction="sum")
    return float(loss) / math.log(2)
