"""One cell of a study, measured: the policy at its budget put on the model, the task done, the policy taken off."""

import functools
import math
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention import AppliedAttention, AppliedDecode, AppliedEviction, PolicySearch, apply
from ..attention.portable import Policy, options_for, options_from
from ..attention.watch import watch
from ..checks import check_int, fail
from ..measure.continuation import continuation
from ..measure.cost import decode, prefill, time_interleaved
from ..measure.data import read_text
from ..measure.flops import flops
from ..measure.harness import evaluate
from ..measure.prompts import TASKS
from ..measure.retrieval import build_prompt, retrieval_accuracy
from ..measure.tokens import check_context, encode, leading_ids
from ..models.calibration import calibration_batches
from ..models.load import Loaded, load
from .methods import Knob
from .plan import COST, DENSE, LM_EVAL, PERPLEXITY, Cell, Line, Study

Applied = AppliedAttention | AppliedDecode | AppliedEviction
MODES = {"prefill": "teacher_forced", "decode": "generate"}
"""A sparse prefill is asked in one pass: dense decoding would read all of the prompt again. Sparse decoding is asked in
cached steps after a dense prefill, the question included, so that only what is generated is sparse."""
LEFT_DENSE = ("dense_prompts", "dense_steps", "whole_caches")
"""Where the state of a policy counts what it left to the dense model."""
TURNS = 7
"""Halvings of the range of a knob."""
NUM_PREDICTED = 32
"""Tokens at the end of a window that perplexity is measured on."""
TIMED_TOKENS = 16
"""Tokens decoded in one round of timing."""
CHARACTERS = 64
"""Of the text this many times the longest prompt's tokens are used: tokenizing more only takes time."""
NUM_SAMPLES = 4
"""Calibration texts of a method that searches."""


class Worker:
    """A model, a text and a plan, ready to measure any cell of it.

    Args:
        plan: the study.
        loaded: its model; loaded here if None.
        text: instead of the plan's texts, both of them.
    """

    def __init__(self, plan: Study, loaded: Loaded | None = None, text: str | None = None) -> None:
        self.plan = plan
        self.loaded = loaded or load(plan.model, dtype=plan.dtype)
        self.tokenizer = self.loaded.need_tokenizer("study")
        enough = CHARACTERS * max(plan.lengths)
        self.text = (text or read_text(plan.text, role="study"))[:enough]
        self._ids = encode(self.tokenizer, self.text)
        self._calibrate = functools.cache(
            lambda length, samples: calibration_batches(
                self.tokenizer,
                (text or read_text(plan.calibration_text, role="calibration"))[:enough],
                num_samples=samples,
                length=length,
            )
        )
        self._policies: dict[tuple[str, float, int], Policy] = {}

    def check(self, cell: Cell) -> None:
        """Refuse what cannot be measured: a wrong option, a task that does not fit the length or the text.

        Raises:
            InputError: as the measurement would.
        """
        if not cell.task.startswith(LM_EVAL):
            check_context("study", "lengths", self.loaded.model, cell.length)
        if cell.task in (PERPLEXITY, COST):
            check_int("study", "lengths", cell.length, 4)
            room = cell.length - len(leading_ids(self.tokenizer))
            if room > len(self._ids):
                raise fail("study", "text", f"have at least {room} tokens", len(self._ids))
        if cell.line != DENSE:
            line = self._line(cell)
            options = line.options_at(cell.budget, cell.length)
            built = build(line.method, options.options(options.high) if isinstance(options, Knob) else options)
            if isinstance(options, Knob):
                self._calibrate(cell.length, 1)
            elif isinstance(built, PolicySearch):
                self._calibrate(cell.length, NUM_SAMPLES)
        elif cell.task in TASKS and cell.seed == 0:
            rng = random.Random(0)
            build_prompt(self.tokenizer, TASKS[cell.task](rng), self._ids, cell.length, rng, line_ends=())

    def measure(self, cell: Cell, *, seed: int = 0) -> dict[str, Any]:
        """What a cell holds, as JSON values.

        Args:
            cell: one of the plan's.
            seed: added to the cell's.

        Returns:
            ``scores`` (or ``nats`` and ``bytes``) by prompt, ``density`` and ``dense`` (how often a policy left a text
            dense, by reason); or, of a cell of costs, what `_cost` says.
        """
        if cell.task == COST:
            return self._cost(cell)
        with self._installed(cell) as applied:
            found = self._quality(cell, cell.seed + seed)
            return found | _density(applied)

    def _quality(self, cell: Cell, seed: int) -> dict[str, Any]:
        model, tokenizer, mode = self.loaded.model, self.tokenizer, MODES[cell.phase]
        shared: dict[str, Any] = {"length": cell.length, "seed": seed, "mode": mode}
        if cell.task.startswith(LM_EVAL):
            return evaluate(model, tokenizer, cell.task.removeprefix(LM_EVAL), limit=self.plan.limit)
        if cell.task == PERPLEXITY:
            count = min(NUM_PREDICTED, cell.length // 4)
            found = continuation(
                model, tokenizer, self.text, num_tokens=count, num_windows=self.plan.num_prompts, **shared
            )
            return {"nats": list(found.window_nats), "bytes": found.num_bytes}
        answers = retrieval_accuracy(
            model, tokenizer, task=cell.task, filler=self.text, num_prompts=self.plan.num_prompts, **shared
        )
        return {"scores": list(answers.scores)}

    def _cost(self, cell: Cell) -> dict[str, Any]:
        """Work and median time of the whole model, dense and sparse in turns, and the seconds of the choice.

        Of a prefill of the cell's length, or of a token decoded after it; ``select_seconds`` is None where a policy
        does not tell.
        """
        policy, model, tokens = self.policy(cell), self.loaded.model, 1
        room = cell.length - TIMED_TOKENS if cell.phase == "decode" else cell.length
        ids = torch.tensor([[*leading_ids(self.tokenizer), *self._ids][: max(2, room)]])
        applied: list[Applied] = []
        ready: dict[str, tuple[Tensor, Any]] = {}

        def install(name: str) -> None:
            while applied:
                applied.pop().remove()
            if name != DENSE:
                applied.append(apply(model, policy))
            if cell.phase == "decode":
                ready[name] = prefill(model, ids)

        def run(name: str) -> None:
            if cell.phase == "decode":
                decode(model, *ready.pop(name), tokens)
            else:
                prefill(model, ids)

        names = (DENSE, cell.line)
        work, choosing = {}, None
        try:
            for name in names:
                install(name)
                work[name] = flops(partial(run, name))
            density = _density(applied[0])
            tokens = TIMED_TOKENS if cell.phase == "decode" else 1
            install(cell.line)
            choosing = _choosing(applied[0], partial(run, cell.line))
            times = time_interleaved(
                {name: partial(run, name) for name in names},
                repeats=self.plan.repeats,
                prepare={name: partial(install, name) for name in names},
            ).timings
        finally:
            while applied:
                applied.pop().remove()
        return density | {
            "flops": work[cell.line],
            "dense_flops": work[DENSE],
            "seconds": times[cell.line].median / tokens,
            "dense_seconds": times[DENSE].median / tokens,
            "select_seconds": None if choosing is None else choosing / tokens,
        }

    def policy(self, cell: Cell) -> Policy:
        """The policy of a cell; knobs are turned and searches made once for each budget and length."""
        key = (cell.line, cell.budget, cell.length)
        if key not in self._policies:
            self._policies[key] = self._find(cell)
        return self._policies[key]

    def _find(self, cell: Cell) -> Policy:
        line = self._line(cell)
        options = line.options_at(cell.budget, cell.length)
        if isinstance(options, Knob):
            return self._turned(line.method, options, cell)
        found = build(line.method, options)
        if isinstance(found, PolicySearch):
            return found.fit(self.loaded.model, self._calibrate(cell.length, NUM_SAMPLES))
        return found

    def _line(self, cell: Cell) -> Line:
        return next(line for line in self.plan.methods if line.label == cell.line)

    def _turned(self, method: str, knob: Knob, cell: Cell) -> Policy:
        """Bisection: of the values tried the one whose density is nearest to the budget."""
        (ids,), tried = self._calibrate(cell.length, 1), []
        ids = ids[:, : ids.shape[1] - TIMED_TOKENS] if cell.phase == "decode" else ids
        low, high = knob.low, knob.high
        for _ in range(TURNS):
            middle = (low + high) / 2
            policy = build(method, knob.options(middle))
            assert isinstance(policy, Policy)
            applied = apply(self.loaded.model, policy)
            try:
                logits, cache = prefill(self.loaded.model, ids)
                if cell.phase == "decode":
                    decode(self.loaded.model, logits, cache, TIMED_TOKENS)
                density = _density(applied)["density"]
            finally:
                applied.remove()
            tried.append((abs(density - cell.budget), middle, policy))
            low, high = (middle, high) if density < cell.budget else (low, middle)
        return min(tried, key=lambda one: one[:2])[2]

    @contextmanager
    def _installed(self, cell: Cell) -> Iterator[Applied | None]:
        """The cell's policy in force, nothing for the dense model."""
        if cell.line == DENSE:
            yield None
            return
        applied = apply(self.loaded.model, self.policy(cell))
        try:
            yield applied
        finally:
            applied.remove()


def build(method: str, options: dict[str, Any]) -> Policy | PolicySearch:
    """The options of a method; prompts of any length are sparse unless ``min_length`` is given.

    Raises:
        InputError: if an option is wrong.
    """
    always = {"min_length": 0} if "min_length" in options_for(method).model_fields else {}
    return options_from({"method": method} | always | options)


def _density(applied: Applied | None) -> dict[str, Any]:
    """What was really read, mean over the layers that the policy rules, and why texts were left dense."""
    if applied is None:
        return {"density": 1.0, "dense": {}}
    shares = list(applied.density().values())
    return {
        "density": statistics.mean(shares) if shares else math.nan,
        "dense": next(counts for name, counts in applied.state().items() if name in LEFT_DENSE),
    }


def _choosing(applied: Applied, run: Callable[[], object]) -> float | None:
    """Seconds that the choice takes in one run; None for eviction, which is part of the prefill."""
    if isinstance(applied, AppliedEviction):
        return None
    if isinstance(applied, AppliedDecode):
        applied.reset()
        run()
        return applied.select_seconds
    seconds: list[float] = []
    watch(applied, lambda seen: seconds.append(seen.done.select_seconds), run)
    return sum(seconds)
