"""What the claims on fixed patterns share: windows of a given cost, and how surely hidden facts are answered."""

import bisect
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..attention import PrefillPolicy, Prompt, SinkWindow, apply
from ..kernels.attention import Pattern
from ..measure.prompts import TASKS
from ..measure.retrieval import Prompt as Question
from ..measure.retrieval import build_prompt
from ..measure.tokens import device_of, encode, evaluating, forward, line_end_ids
from ..models.load import Loaded


@dataclass(frozen=True)
class Answers:
    """How a model answered under a policy.

    Args:
        accuracy: share of the prompts of whose answer every token was the likeliest.
        nats: mean negative log-likelihood of an answer.
        density: pairs of query and key computed, as a share of the dense model's, mean over layers.
    """

    accuracy: float
    nats: float
    density: float


def text_config(loaded: Loaded) -> Any:
    """The configuration of the language model, with its numbers of layers and heads."""
    model: Any = loaded.model
    return model.config.get_text_config()


def hidden_facts(
    loaded: Loaded, filler: str, *, task: str, length: int, num_prompts: int, seed: int = 0
) -> list[Question]:
    """Prompts as `paucity.measure.retrieval.retrieval_accuracy` has them, to ask several policies the same."""
    tokenizer, rng = loaded.need_tokenizer("hidden_facts"), random.Random(seed)
    filler_ids = encode(tokenizer, filler)
    ends = line_end_ids(tokenizer, filler_ids)
    facts = (TASKS[task](rng) for _ in range(num_prompts))
    return [build_prompt(tokenizer, fact, filler_ids, length, rng, line_ends=ends) for fact in facts]


@torch.no_grad()
def answer(loaded: Loaded, questions: Sequence[Question], policy: PrefillPolicy | None = None) -> Answers:
    """Read every prompt together with its answer, all of it under ``policy`` (None is dense)."""
    applied = None if policy is None else apply(loaded.model, policy)
    right, nats = [], []
    try:
        with evaluating(loaded.model):
            for question in questions:
                count = len(question.answer_ids)
                ids = torch.tensor([[*question.ids, *question.answer_ids]], device=device_of(loaded.model))
                logits, _ = forward(loaded.model, ids[:, :-1], keep=count)
                wanted = ids[0, -count:]
                prob = logits[0].float().log_softmax(-1)
                right.append(float((prob.argmax(-1) == wanted).all()))
                nats.append(-float(prob.gather(-1, wanted.unsqueeze(-1)).sum()))
        density = 1.0 if applied is None else statistics.mean(applied.density().values())
    finally:
        if applied is not None:
            applied.remove()
    return Answers(statistics.mean(right), statistics.mean(nats), density)


def mean_answers(answers: Sequence[Answers]) -> Answers:
    """The mean of each figure."""
    columns = ([getattr(one, name) for one in answers] for name in ("accuracy", "nats", "density"))
    return Answers(*map(statistics.mean, columns))


def pattern_of(policy: PrefillPolicy, length: int, num_heads: int = 1) -> Pattern:
    """The pattern of a policy that looks at no query and no key, for a text of ``length`` tokens."""
    nothing = torch.zeros(1, num_heads, length, 1)
    return policy.select(nothing, nothing, Prompt())


def pairs_of(policy: PrefillPolicy, length: int) -> int:
    """Pairs of query and key that it computes in one head."""
    return int(pattern_of(policy, length).kept_pairs(length, length).sum())


def window_of_cost(pairs: float, length: int, *, num_sinks: int) -> SinkWindow:
    """The smallest window with ``num_sinks`` that computes at least ``pairs`` in a text of ``length`` tokens."""

    def window(size: int) -> SinkWindow:
        return SinkWindow(num_sinks=num_sinks, window_size=size, min_length=0)

    return window(1 + bisect.bisect_left(range(1, length), pairs, key=lambda size: pairs_of(window(size), length)))
