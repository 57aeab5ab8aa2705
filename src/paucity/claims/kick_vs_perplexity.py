"""Claim: pruning costs a model its knowledge before perplexity tells, and leaves what it reads from its context.

Paper: Jaiswal et al. 2023 (LLM-KICK), https://arxiv.org/abs/2310.01382, abstract: knowledge is lost at 25-30 % already
and at N:M altogether, while perplexity hardly moves; retrieval from context and summaries bear 50 % and more. A loss of
up to 5 % of dense is tolerated here.
"""

import copy
import time
from typing import Any

from ..measure.abilities import Scores, paired
from ..measure.agreement import agreement
from ..measure.data import held_out_python, read_text
from ..measure.kick_jobs import prepare
from ..measure.kick_options import Kick
from ..measure.stats import Estimate
from ..models.calibration import calibration_batches
from ..models.load import Loaded, load
from ..weights.apply import apply_step, options_for
from . import CLAIMS
from .base import ClaimResult

NAME = "kick-vs-perplexity"
TOLERANCE = 0.05
_CALIBRATED = ("sparsegpt", "wanda")
METHODS = ("magnitude", *_CALIBRATED)
TRIVIAL, HALF, PATTERN = "30%", "50%", "2:4"
_SETTINGS: dict[str, dict[str, Any]] = {f"{share}0%": {"sparsity": share / 10} for share in range(1, 8)}
_SETTINGS[PATTERN] = {"n": 2, "m": 4}
_IN_CONTEXT = (TRIVIAL, HALF, PATTERN)
_LENGTH = 512
Losses = dict[str, Estimate | None]


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Prune with every method at every sparsity and ask dense and sparse the same.

    What is read from the context is asked at 30 %, 50 % and 2:4 only. Where calibration is drawn anew, the scores of a
    question are averaged.

    Args:
        quick: those three settings, the calibrated methods, one draw, fewer questions.
        seed: of the questions and of the first draw of calibration; the others follow.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    tokenizer, text = loaded.need_tokenizer(NAME), held_out_python()
    settings = {name: _SETTINGS[name] for name in (_IN_CONTEXT if quick else _SETTINGS)}
    asked = Kick(
        tasks=("knowledge", "open_book", "retrieval", "summary"),
        num_questions=80 if quick else 271,
        num_open=8 if quick else 48,
        retrieval=("passkey",) if quick else ("key_value",),
        length=_LENGTH if quick else 2 * _LENGTH,
        num_prompts=8 if quick else 24,
        num_summaries=6 if quick else 20,
        max_tokens=1024 if quick else 3072,
    )
    jobs = prepare(asked, loaded.model, tokenizer, text, seed)
    teacher = copy.deepcopy(loaded.model)
    dense = {job.name: job.measure(teacher, None) for job in jobs}
    calibration, draws = read_text("python", role="calibration"), [seed] if quick else [seed, seed + 1]
    batches = [calibration_batches(tokenizer, calibration, num_samples=8, length=_LENGTH, seed=draw) for draw in draws]
    losses: dict[str, dict[str, Losses]] = {method: {} for method in (_CALIBRATED if quick else METHODS)}
    for method in losses:
        for name, options in settings.items():
            scores: dict[str, list[Scores]] = {job.name: [] for job in jobs}
            found: Losses = {}
            redrawn = method in _CALIBRATED and name in _IN_CONTEXT
            for number, batch in enumerate(batches if redrawn else batches[:1]):
                applied = apply_step(loaded, method, options_for(method)(**options), batch)
                try:
                    for job in jobs:
                        if job.name == "knowledge" or (name in _IN_CONTEXT and not number):
                            scores[job.name].append(job.measure(loaded.model, None))
                    if not number:
                        how: dict[str, Any] = {"length": _LENGTH, "max_tokens": asked.max_tokens, "seed": seed}
                        read = agreement(teacher, loaded.model, tokenizer, text, **how)
                        found = {"perplexity": read.perplexity_change, "nats": read.loss_change}
                finally:
                    applied.remove()
            for job in jobs:
                if scores[job.name]:
                    change = paired(*("",) * 4, dense[job.name], _mean(scores[job.name]), seed=seed).change
                    found[job.name] = None if change is None else _negative(change)
            losses[method][name] = found
    parts = _parts(losses)
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={
            "knowledge within 5 % of dense": "up to 20-25 %, never with N:M",
            "retrieval from context and summaries": "robust at 50 % and more",
        },
        measured={
            "parts": parts,
            "beyond 5 % from": {method: _first(by_setting) for method, by_setting in losses.items()},
            "lost, relative to dense": {
                method: {
                    name: {key: _shown(value) for key, value in found.items()} for name, found in by_setting.items()
                }
                for method, by_setting in losses.items()
            },
            "dense": {name: round(score.estimate(seed).value, 4) for name, score in dense.items()},
        },
        holds=all(parts.values()),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "asked": asked.model_dump(mode="json", exclude_defaults=True),
            "calibration": {"text": "python", "num_samples": 8, "length": _LENGTH, "seeds": draws},
            "text": "held_out_python",
            "tolerance": TOLERANCE,
        },
    )


def _parts(losses: dict[str, dict[str, Losses]]) -> dict[str, bool]:
    """What must hold; one loss is more than another where their 95 % intervals are apart."""
    return {
        "with some method, knowledge falls more than perplexity rises at 30 %": any(
            _more(found[TRIVIAL]["knowledge"], found[TRIVIAL]["perplexity"]) for found in losses.values()
        ),
        "with every method, knowledge falls beyond 5 % at 2:4": all(
            _low(found[PATTERN]["knowledge"]) > TOLERANCE for found in losses.values()
        ),
        "at 50 % the same questions with the answer in the prompt fall less": all(
            _more(losses[method][HALF]["knowledge"], losses[method][HALF].get("open_book")) for method in _CALIBRATED
        ),
    }


def _low(found: Estimate | None) -> float:
    return float("-inf") if found is None or found.low is None else found.low


def _more(one: Estimate | None, other: Estimate | None) -> bool:
    return other is not None and other.high is not None and _low(one) > other.high


def _first(by_setting: dict[str, Losses]) -> dict[str, str | None]:
    """The lowest sparsity at which each has lost more than the tolerance, in the mean."""
    names = dict.fromkeys(name for found in by_setting.values() for name in found)
    swept = {setting: found for setting, found in by_setting.items() if setting != PATTERN}
    return {
        name: next((s for s, found in swept.items() if (e := found.get(name)) and e.value > TOLERANCE), None)
        for name in names
    }


def _mean(draws: list[Scores]) -> Scores:
    """Scores averaged over draws, question by question."""
    scores = [sum(values) / len(values) for values in zip(*(draw.scores for draw in draws), strict=True)]
    return Scores(scores, draws[0].weights, draws[0].chance)


def _negative(change: Estimate) -> Estimate:
    low, high = (None if end is None else -end for end in (change.high, change.low))
    return Estimate(-change.value, low, high, change.num_samples, change.confidence)


def _shown(found: Estimate | None) -> list[float | None] | None:
    """Value, low and high."""
    ends = () if found is None else (found.value, found.low, found.high)
    return None if found is None else [None if end is None else round(end, 4) for end in ends]
