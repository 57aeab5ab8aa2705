"""Claim: at equal density spans of MoA keep retrieval from far better than one window for all heads.

Paper: Fu et al. 2024, https://arxiv.org/abs/2406.14909, Tables 2-4: retrieval accuracy 1.5 to 7.1 times that of a
uniform window at 50 % density, perplexity and long-context tasks nearer to the dense model.

The rules are found on retrieval prompts (only their answers are supervision) and Python text, both of the training
part and of other seeds than what is measured. The uniform policy has the same sinks and, for each length, the smallest
window that computes as many pairs: its density is never below that of MoA. The claim holds where accuracy, mean over
tasks, lengths and densities, is higher and nats per token are lower. Differences: a density is of pairs, where the
paper counts keys cached; the model is small, so that profile lengths are 1k to 4k and one of them validates; layers of
four heads have any number of rules. Not measured: LongBench, speed, and the paper's extension far beyond the profiled
lengths.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..attention import Influence, MoA, Spans, apply
from ..attention.influence import IGNORED
from ..attention.moa import Batch, best_plan
from ..attention.spans import pair_share
from ..checks import InputError
from ..measure.data import held_out_python, python_documents
from ..measure.prompts import TASKS
from ..measure.quality import bits_per_byte
from ..measure.retrieval import ANSWER_SLACK, build_prompt
from ..measure.tokens import context_length, encode, line_end_ids
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult
from .forced import forced_accuracy

NAME = "moa-beats-uniform"
TASKS_ASKED = ("passkey", "key_value")
DENSITIES = (0.5, 0.35)
LONGEST = 4096
NUM_DOCUMENTS = 12


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Find spans for each density, and measure them and the uniform window on text never trained on.

    Args:
        quick: one density, two profile lengths of which the longer is measured, fewer prompts.
        seed: of the prompts that are measured; those of the calibration have others.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    model, tokenizer = loaded.model, loaded.need_tokenizer(NAME)
    held_out = held_out_python()
    room = min(context_length(model) or LONGEST, len(encode(tokenizer, held_out)), LONGEST)
    profiled = [room // 4, room // 2] if quick else [room // 4, room // 2, room]
    lengths, densities = profiled[1:], DENSITIES[:1] if quick else DENSITIES
    num_texts, num_prompts, max_tokens = (1, 6, 4096) if quick else (2, 10, 16384)
    calibration = Calibration(tokenizer, seed)
    measure = partial(measured, loaded, held_out, lengths, num_prompts=num_prompts, max_tokens=max_tokens, seed=seed)

    search = MoA(num_intervals=1 if quick else 2, rules_per_layer=None, min_length=0)
    profiles = search.profile(model, [text for n in profiled for text in calibration.texts(n, num_texts)])
    validation = calibration.texts(lengths[-1], 1)
    by_density: list[dict[str, Any]] = []
    for density in densities:
        plans = search.model_copy(update={"density": density}).plans(profiles)
        plan = best_plan(model, plans, validation)
        uniform = {n: uniform_spans(plan, n, profiles[0]) for n in lengths}
        by_density.append(
            {
                "at_most": density,
                "moa": measure(dict.fromkeys(lengths, plan)),
                "uniform": measure(uniform),
                "uniform_windows": {n: spans.alpha for n, spans in uniform.items()},
                "spans": {
                    n: [plan.span(layer, n, profiles[0].blocks.shape[1]) for layer in profiles[0].layers]
                    for n in lengths
                },
            }
        )
    gains = {
        "accuracy": statistics.mean(r["moa"]["mean_accuracy"] - r["uniform"]["mean_accuracy"] for r in by_density),
        "nats_per_token": statistics.mean(r["uniform"]["text"]["nats"] - r["moa"]["text"]["nats"] for r in by_density),
    }
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"retrieval accuracy, times that of a uniform window at 50 % density": [1.5, 7.1]},
        measured={"mean_gain": gains, "dense": measure(dict.fromkeys(lengths)), "by_density": by_density},
        holds=gains["accuracy"] > 0 and gains["nats_per_token"] > 0,
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "profile_lengths": profiled,
            "texts": f"at each length {num_texts} of python and {num_texts} of each task; 1 to choose from the front",
            "tasks": list(TASKS_ASKED),
            "num_prompts": num_prompts,
            "mode": "teacher_forced",
            "text": "held_out_python",
            "max_tokens": max_tokens,
            "search": search.model_dump(mode="json", exclude={"density"}),
        },
    )


class Calibration:
    """Python text of the training part, all of whose tokens count, and retrieval prompts whose answers count."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        documents = random.Random(seed).sample(python_documents(include_tests=False), NUM_DOCUMENTS)
        self.tokenizer, self.rng = tokenizer, random.Random(seed + 1_000_003)
        self.filler = encode(tokenizer, "\n".join(documents))
        self.line_ends = line_end_ids(tokenizer, self.filler)

    def texts(self, length: int, count: int) -> list[Batch]:
        """``count`` texts of each kind; tasks whose facts are too long for the length are left out."""
        found: list[Batch] = []
        for _ in range(count):
            start = self.rng.randrange(len(self.filler) - length)
            found.append((torch.tensor([self.filler[start : start + length]]), None))
            for task in TASKS_ASKED:
                with suppress(InputError):
                    found.append(self._prompt(task, length))
        return found

    def _prompt(self, task: str, length: int) -> Batch:
        fact = TASKS[task](self.rng)
        size = length + ANSWER_SLACK  # for which no room is wanted here
        prompt = build_prompt(self.tokenizer, fact, self.filler, size, self.rng, line_ends=self.line_ends)
        ids = torch.tensor([[*prompt.ids, *prompt.answer_ids]])
        return ids, torch.where(torch.arange(ids.shape[1]) >= len(prompt.ids), ids, IGNORED)


def measured(
    loaded: Loaded,
    held_out: str,
    lengths: Sequence[int],
    policies: Mapping[int, Spans | None],
    *,
    num_prompts: int,
    max_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Retrieval at every length under the policy for it, and perplexity at the longest, each with its density."""
    model, tokenizer = loaded.model, loaded.need_tokenizer(NAME)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        with in_force(model, policies[length]) as density:
            found = forced_accuracy(loaded, TASKS_ASKED, held_out, length=length, num_prompts=num_prompts, seed=seed)
            rows.append({"length": length, **found, "density": density()})
    length = lengths[-1]
    with in_force(model, policies[length]) as density:
        text = bits_per_byte(model, tokenizer, held_out, length=length, stride=length // 2, max_tokens=max_tokens)
        on_text = {"perplexity": text.perplexity.value, "nats": text.nats_per_token.value, "density": density()}
    accuracy = statistics.mean(row[task] for row in rows for task in TASKS_ASKED)
    return {"mean_accuracy": accuracy, "retrieval": rows, "text": on_text}


def uniform_spans(plan: Spans, length: int, profile: Influence) -> Spans:
    """The smallest window, in whole blocks, with which all heads together compute no fewer pairs than ``plan``."""
    heads = profile.blocks.shape[1]
    spans = [span for layer in profile.layers for span in plan.span(layer, length, heads)]
    wanted = statistics.mean(pair_share(span, plan.num_sinks, length) for span in spans)
    sizes = range(plan.block_size, length + plan.block_size, plan.block_size)
    size = next(size for size in sizes if pair_share(size, plan.num_sinks, length) >= wanted - 1e-9)
    return Spans(alpha=float(size), beta=0.0, num_sinks=plan.num_sinks, min_length=0)


@contextmanager
def in_force(model: nn.Module, policy: Spans | None) -> Iterator[Callable[[], float]]:
    """The policy on the model, and what tells the mean density of the prompts since then."""
    if policy is None:
        yield lambda: 1.0
        return
    applied = apply(model, policy)
    try:
        yield lambda: statistics.mean(applied.density().values())
    finally:
        applied.remove()
