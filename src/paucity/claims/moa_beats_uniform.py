"""Claim: at equal density spans of MoA keep retrieval from far better than one window for all heads.

Paper: Fu et al. 2024, https://arxiv.org/abs/2406.14909, Tables 2-4: retrieval accuracy 1.5 to 7.1 times that of a
uniform window at 50 % density, perplexity and long-context tasks nearer to the dense model.

The rules are found on retrieval prompts (only their answers are supervision) and Python text, both of the training
part and of other seeds than what is measured. The uniform policy has the same sinks and the window, as a share of the
text, that computes as many pairs: its density is never below that of MoA. The claim holds where accuracy, mean over
tasks, lengths and densities, is higher and nats per token are lower. Differences: a density is of pairs, where the
paper counts keys cached; the model is small, so that profile lengths are 1k to 4k and one of them validates; layers of
four heads have any number of rules. Not measured: LongBench, speed, and the paper's extension far beyond the profiled
lengths.
"""

import random
import statistics
import time
from typing import Any

import torch

from ..attention import MoA, Spans, apply
from ..attention.moa import Batch
from ..attention.spans import pair_share
from ..checks import InputError
from ..measure.data import held_out_python, python_documents
from ..measure.prompts import TASKS
from ..measure.quality import bits_per_byte
from ..measure.retrieval import ANSWER_SLACK, build_prompt, retrieval_accuracy
from ..measure.tokens import context_length, encode, line_end_ids
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult

NAME = "moa-beats-uniform"
RETRIEVAL = ("passkey", "key_value")
NUM_SINKS, BLOCK = 64, 64
NUM_DOCUMENTS = 60


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Find spans for each density once, and measure them and the uniform window on text never trained on.

    Args:
        quick: one density, two lengths, fewer prompts.
        seed: of the prompts that are measured; those of the calibration have others.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    model, tokenizer = loaded.model, loaded.need_tokenizer(NAME)
    held_out = held_out_python()
    room = min(context_length(model) or 4096, len(encode(tokenizer, held_out)), 4096)
    profiled = [room // 4, room // 2] if quick else [room // 4, room // 2, room]
    measured_at = [room // 2] if quick else [room // 2, room]
    densities = (0.5,) if quick else (0.5, 0.35)
    num_texts, num_prompts, max_tokens = (1, 8, 8192) if quick else (2, 16, 24576)
    documents = random.Random(seed).sample(python_documents(include_tests=False), NUM_DOCUMENTS)
    filler, rng = encode(tokenizer, "\n".join(documents)), random.Random(seed + 1_000_003)
    ends = line_end_ids(tokenizer, filler)

    def retrieval_text(task: str, length: int) -> Batch:
        prompt = build_prompt(tokenizer, TASKS[task](rng), filler, length + ANSWER_SLACK, rng, line_ends=ends)
        ids = torch.tensor([[*prompt.ids, *prompt.answer_ids]])
        counts = torch.arange(ids.shape[1]) >= len(prompt.ids)
        return ids, torch.where(counts, ids, -100)

    def plain_text(length: int) -> Batch:
        start = rng.randrange(len(filler) - length)
        return torch.tensor([filler[start : start + length]]), None

    def texts(length: int, count: int) -> list[Batch]:
        answers = [retrieval_text(task, length) for _ in range(count) for task in RETRIEVAL]
        return [*answers, *(plain_text(length) for _ in range(count))]

    def measure(policy: Spans | None) -> dict[str, Any]:
        applied = None if policy is None else apply(model, policy)
        try:
            rows: list[dict[str, Any]] = []
            for length in measured_at:
                row: dict[str, Any] = {"length": length}
                for task in RETRIEVAL:
                    found = retrieval_accuracy(
                        model,
                        tokenizer,
                        task=task,
                        length=length,
                        filler=held_out,
                        num_prompts=num_prompts,
                        seed=seed,
                        mode="teacher_forced",
                    )
                    row[task] = found.accuracy.value
                if applied is not None:
                    row["density"] = statistics.mean(applied.density().values())
                    applied.reset()
                rows.append(row)
            length = measured_at[-1]
            quality = bits_per_byte(
                model, tokenizer, held_out, length=length, stride=length // 2, max_tokens=max_tokens
            )
            result = {"retrieval": rows, "nats_per_token": quality.nats_per_token.value}
            if applied is not None:
                result["density_on_text"] = statistics.mean(applied.density().values())
            return result
        finally:
            if applied is not None:
                applied.remove()
