"""Claim: beyond the length that a model was trained on, dual-chunk attention predicts better than the model alone.

Papers: An et al. 2024, https://arxiv.org/abs/2402.17463 (Llama-2 70B reads more than 100k tokens without training; the
authors' repository has Llama-3 8B, trained on 8k tokens, with level perplexity up to 32k); Qwen2.5-1M,
https://arxiv.org/abs/2501.15383, Sec. 5.1, for sizes and the logit scale. The embedded model was trained on texts of
4,096 tokens. It reads source code of three to four times that, part after part on a cache; every part after the
first is beyond. `holds` says that the mean loss there is lower with dual-chunk attention, and the same in the first
part. Beside it, in the full run: the model alone with its texts cut to the trained length (what a distant past is
worth), the logit scale, sparse selection with the pairs that it reads, and passkeys at three times the trained
length, whose answers take decode steps. Differences: a model of 4.5 M parameters with a rotary base of 1,000,000, which
degrades slowly; a local size of an eighth of the chunk, as in the report.
"""

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..attention.apply import AppliedAttention, apply
from ..attention.dual_chunk import DualChunk
from ..attention.vertical_slash import VerticalSlash
from ..measure.data import held_out_python
from ..measure.prompts import TASKS
from ..measure.retrieval import answer_score, build_prompt, generate_answer
from ..measure.tokens import context_length, device_of, encode, evaluating, forward, leading_ids
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult

NAME = "dual-chunk-extrapolates"
TRAINED_ON = {"embedded": 4096}
"""Tokens of the texts that a model was trained on, where these were shorter than its context."""

SAME = 0.01  # nats per token that bfloat16 may make of the same attention


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Measure the loss by position, of the model alone and with dual-chunk attention.

    Args:
        quick: shorter texts, without variants and passkeys.
        seed: of the places of the texts, and of the passkeys.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    tokenizer = loaded.need_tokenizer(NAME)
    held_out = held_out_python()
    ids = encode(tokenizer, held_out)
    trained = TRAINED_ON.get(loaded.source) or context_length(loaded.model) or 4096
    trained = min(trained, len(ids) // 2 + 1)
    length, num_texts = (3 if quick else 4) * trained, 2
    texts = _texts(torch.tensor(ids), leading_ids(tokenizer), min(length, len(ids)), num_texts, seed)
    local = max(1, trained // 8)
    dual = DualChunk(chunk_size=trained, local_size=local, min_length=0, sparse=None)
    policies = {"dual_chunk": dual}
    if not quick:
        lines = VerticalSlash(vertical_share=1 / 16, slash_share=1 / 64, min_length=trained + 1)
        policies["with_logit_scale"] = dual.model_copy(update={"original_length": trained})
        policies["with_sparse_selection"] = dual.model_copy(update={"sparse": lines})

    losses = {"model_alone": [_losses(loaded, text, trained) for text in texts]}
    if not quick:
        losses["model_alone_on_cut_texts"] = [_losses(loaded, text, trained, cut=True) for text in texts]
    density = {}
    for name, policy in policies.items():
        with _applied(loaded, policy) as applied:
            losses[name] = [_losses(loaded, text, trained) for text in texts]
            density[name] = statistics.mean(applied.density().values())
    by_part = {name: torch.stack([_parts(row, trained) for row in rows]) for name, rows in losses.items()}
    beyond = {name: [float(row[trained:].mean()) for row in rows] for name, rows in losses.items()}
    within = {name: float(parts[:, 0].mean()) for name, parts in by_part.items()}
    gains = [alone - dual for alone, dual in zip(beyond["model_alone"], beyond["dual_chunk"], strict=True)]
    passkeys = (
        {} if quick else _passkeys(loaded, held_out, 3 * trained, {"model_alone": None, "dual_chunk": dual}, seed)
    )
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={
            "perplexity of Llama-3 8B with it on PG-19, by thousand tokens, trained on 8": {
                "4": 9.04,
                "8": 8.71,
                "16": 8.61,
                "32": 8.62,
                "64": 8.95,
                "128": 10.04,
            }
        },
        measured={
            "gain_in_nats_per_token_beyond": {"mean": statistics.mean(gains), "by_text": gains},
            "nats_per_token_beyond": {name: statistics.mean(rows) for name, rows in beyond.items()},
            "nats_per_token_within": within,
            "nats_per_token_by_part": {name: parts.mean(0).tolist() for name, parts in by_part.items()},
            "density_of_pairs": density,
            "passkeys_found": passkeys,
        },
        holds=statistics.mean(gains) > 0 and abs(within["dual_chunk"] - within["model_alone"]) < SAME,
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "trained_length": trained,
            "chunk_size": trained,
            "local_size": local,
            "text": "held_out_python",
            "length": len(texts[0]),
            "num_texts": len(texts),
        },
    )


def _texts(ids: Tensor, lead: list[int], length: int, count: int, seed: int) -> list[Tensor]:
    """Stretches of ``length`` tokens, those of ``lead`` included, that do not overlap, from random places."""
    size = length - len(lead)
    count = min(count, max(1, len(ids) // size))
    spare = len(ids) - count * size
    draw = random.Random(seed)
    gaps = sorted(draw.randint(0, max(0, spare)) for _ in range(count))
    starts = [gap + number * size for number, gap in enumerate(gaps)]
    return [torch.cat([torch.tensor(lead, dtype=torch.int64), ids[start : start + size]]) for start in starts]


def _losses(loaded: Loaded, text: Tensor, part: int, *, cut: bool = False) -> Tensor:
    """Nats of each token but the first ``[T - 1]``, ``part`` tokens at a time on a cache.

    With ``cut`` nothing is longer than ``part``: windows advance by half of it.
    """
    device, found = device_of(loaded.model), []
    with evaluating(loaded.model):
        if cut:
            step = max(1, part // 2)
            for begin in range(0, max(1, len(text) - 1 - part + step), step):
                window = text[begin : begin + part + 1].to(device)
                keep = len(window) - 1 - (part - step if begin else 0)
                logits, _ = forward(loaded.model, window[None, :-1], keep=keep)
                found.append(_nats(logits[0], window[-keep:]))
            return torch.cat(found)
        cache = None
        for begin in range(0, len(text) - 1, part):
            window = text[begin : begin + part + 1].to(device)
            logits, cache = forward(loaded.model, window[None, :-1], keep=len(window) - 1, cache=cache, use_cache=True)
            found.append(_nats(logits[0], window[1:]))
    return torch.cat(found)


def _nats(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits.float(), target, reduction="none").cpu()


def _parts(losses: Tensor, part: int) -> Tensor:
    return torch.stack([piece.mean() for piece in torch.split(losses, part)])


@contextmanager
def _applied(loaded: Loaded, policy: DualChunk) -> Iterator[AppliedAttention]:
    applied = apply(loaded.model, policy)
    try:
        yield applied
    finally:
        applied.remove()


def _passkeys(
    loaded: Loaded, filler: str, length: int, policies: dict[str, DualChunk | None], seed: int, count: int = 3
) -> dict[str, Any]:
    """How many of ``count`` passkeys are told, in texts of ``length`` tokens."""
    tokenizer, rng = loaded.need_tokenizer(NAME), random.Random(seed)
    ids = encode(tokenizer, filler)
    prompts = [build_prompt(tokenizer, TASKS["passkey"](rng), ids, length, rng) for _ in range(count)]
    found = {}
    for name, policy in policies.items():
        with nullcontext() if policy is None else _applied(loaded, policy), evaluating(loaded.model):
            answers = [generate_answer(loaded.model, tokenizer, prompt) for prompt in prompts]
        found[name] = sum(answer_score(a, p.answers) for a, p in zip(answers, prompts, strict=True)) / count
    return found
