"""Compression of a prompt's cache against kvpress at equal budgets, in turns in one run; without kvpress against dense.

Both libraries read the same prompts, of the embedded model saved as an ordinary folder, cut the cache once after the
prompt to the same number of entries, and answer in the same way: facts asked for at the end of the prompt, and the bits
per byte of a text's continuation. Times are of prompt and compression, and of the steps that follow. All keys of a
prompt are attended to on both sides: by our kernel (`flash`), which a user would put beside an eviction policy, by SDPA
with kvpress and where nothing is evicted.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..attention import (
    AdaKV,
    AppliedAttention,
    AppliedEviction,
    EvictionPolicy,
    ExpectedAttention,
    Flash,
    Knorm,
    SnapKV,
    SparseLayer,
    StreamingLLM,
    Tova,
    apply,
)
from ..measure.after_prompt import Case, after_prompt, continuation_cases, retrieval_cases
from ..measure.cost import decode, prefill
from ..measure.data import held_out_python
from ..models.load import load
from . import BenchRow
from .kvpress import kvpress_peer

DENSITIES = (0.25, 0.1)
TASKS, NUM_PROMPTS, NUM_TEXTS, CONTINUED = ("passkey", "key_value"), 8, 4, 256
LENGTH, TIMED, ROUNDS, STEPS = 2048, 4096, 5, 32
SNAPKV = SnapKV(window_size=64, kernel_size=5, pooling="avg")  # as kvpress has it
METHODS: dict[str, tuple[Callable[[float], EvictionPolicy], str, dict[str, Any], bool]] = {
    "ada_kv": (lambda density: AdaKV(policy=SNAPKV, density=density), "SnapKVPress", {}, True),
    "expected_attention": (lambda density: ExpectedAttention(density=density), "ExpectedAttentionPress", {}, False),
    "knorm": (lambda density: Knorm(density=density), "KnormPress", {}, False),
    "snapkv": (lambda density: SNAPKV.model_copy(update={"density": density}), "SnapKVPress", {}, False),
    "streaming_llm": (
        lambda density: StreamingLLM(density=density, every=0, reindex=False),
        "StreamingLLMPress",
        {},
        False,
    ),
    "tova": (lambda density: Tova(density=density, every=0), "TOVAPress", {}, False),
}
"""Ours, by density; the class in kvpress, its options and whether it stands in an ``AdaKVPress``."""


@dataclass(frozen=True)
class Side:
    """What one library made of a method at a density; ``num_bytes`` is of the cache after the timed prompt."""

    accuracy: float
    bits_per_byte: float
    prefill_seconds: float
    step_seconds: float
    num_bytes: int

    def text(self) -> str:
        """In words."""
        quality = f"accuracy {self.accuracy:.2f}, {self.bits_per_byte:.3f} bits per byte"
        return f"{quality}, {self.num_bytes / 2**20:.2f} MiB, {self.step_seconds * 1e3:.1f} ms a step"


class Ours:
    """A policy of ours with prompts by our exact kernel, or neither."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.applied: list[AppliedAttention | AppliedEviction] = []
        self.state: tuple[torch.Tensor, Any] = (torch.empty(0), None)

    def use(self, policy: EvictionPolicy | None) -> None:
        """Put a policy in the place of the one before."""
        for applied in self.applied:
            applied.remove()
        self.applied = [] if policy is None else [apply(self.model, policy), apply(self.model, Flash())]

    def answer(self, cases: Sequence[Case]) -> list[tuple[bool, float]]:
        """(right, bits) of each case."""
        return [(outcome.right, outcome.bits) for outcome in after_prompt(self.model, cases)]

    def prefill(self, prompt: Sequence[int]) -> tuple[float, int]:
        """Seconds, and bytes of the cache."""
        ids, started = torch.tensor([prompt]), time.perf_counter()
        self.state = prefill(self.model, ids)
        return time.perf_counter() - started, cache_bytes(self.state[1])

    def decode(self, num_tokens: int) -> float:
        """Seconds of steps after the last prompt."""
        started = time.perf_counter()
        decode(self.model, *self.state, num_tokens)
        return time.perf_counter() - started


def run() -> list[BenchRow]:
    """Rows for each method and density against dense, and where kvpress is found against it, with one row of all."""
    loaded = load("embedded")
    tokenizer, text = loaded.need_tokenizer("bench"), held_out_python()
    cases = [
        case
        for task in TASKS
        for case in retrieval_cases(tokenizer, task=task, length=LENGTH, filler=text, num_prompts=NUM_PROMPTS)
    ]
    texts = continuation_cases(tokenizer, text, length=LENGTH, num_tokens=CONTINUED, num_texts=NUM_TEXTS)
    prompt = continuation_cases(tokenizer, text, length=TIMED, num_tokens=1, num_texts=1)[0].prompt
    ours, rows, pairs = Ours(loaded.model), [], []
    measure = partial(_measure, cases=cases, texts=texts, prompt=prompt)
    with kvpress_peer(loaded) as theirs:
        (dense,) = measure([(ours, partial(ours.use, None))])
        for density in DENSITIES:
            for name, (make, press, options, heads) in METHODS.items():
                sides: list[Any] = [(ours, partial(ours.use, make(density)))]
                if theirs is not None:
                    options = options | {"compression_ratio": 1 - density}
                    sides.append((theirs, partial(theirs.use, press, options, heads)))
                found = measure(sides)
                if theirs is not None:
                    pairs.append((found[0], found[1]))
                rows += _rows(name, density, found, dense, f"AdaKVPress({press})" if heads else press)
        ours.use(None)
    return [*rows, _summary(pairs, dense)] if pairs else rows


def cache_bytes(cache: Any) -> int:
    """What the keys and values of a cache hold, room to grow and everything kept beside them included."""
    return sum(
        layer.store.num_bytes
        if isinstance(layer, SparseLayer) and layer.store is not None
        else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
    )


def _measure(
    sides: Sequence[tuple[Any, Callable[[], object]]],
    *,
    cases: Sequence[Case],
    texts: Sequence[Case],
    prompt: Sequence[int],
) -> list[Side]:
    """Quality of each side, then times in turns."""
    answers, seconds, steps, held = [], [list[float]() for _ in sides], [list[float]() for _ in sides], [0] * len(sides)
    for side, use in sides:
        use()
        right = statistics.mean(one for one, _ in side.answer(cases))
        bits = sum(one for _, one in side.answer(texts)) / sum(case.num_bytes for case in texts)
        answers.append((right, bits))
    for turn in range(ROUNDS + 1):
        order = range(len(sides)) if turn % 2 else reversed(range(len(sides)))
        for at in order:
            taken, held[at] = sides[at][0].prefill(prompt)
            stepped = sides[at][0].decode(STEPS) / STEPS
            if turn:  # the first round is warm-up
                seconds[at].append(taken)
                steps[at].append(stepped)
    median = statistics.median
    return [Side(*answers[at], median(seconds[at]), median(steps[at]), held[at]) for at in range(len(sides))]


def _rows(name: str, density: float, found: Sequence[Side], dense: Side, press: str) -> list[BenchRow]:
    """A row against dense, of the steps; and one against kvpress, of the prompt and its compression."""
    mine, kept = found[0], f"{density:.0%}"
    rows = [
        BenchRow(
            bench=f"evict.{name}.{kept.rstrip('%')}",
            size=f"embedded model, a step after {TIMED} tokens cut to {kept}; dense: {dense.text()}",
            ours=f"{name}: {mine.text()}",
            baseline="dense",
            seconds=mine.step_seconds,
            baseline_seconds=dense.step_seconds,
            limit_ratio=1 / density,
        )
    ]
    if len(found) > 1:
        rows.append(
            BenchRow(
                bench=f"evict.kvpress.{name}.{kept.rstrip('%')}",
                size=f"embedded model, prompt of {TIMED} tokens, cut to {kept}; kvpress: {found[1].text()}",
                ours=f"{name}: {mine.text()}",
                baseline=f"kvpress {press}",
                seconds=mine.prefill_seconds,
                baseline_seconds=found[1].prefill_seconds,
                limit_ratio=found[1].prefill_seconds / dense.prefill_seconds,
            )
        )
    return rows


def _summary(pairs: Sequence[tuple[Side, Side]], dense: Side) -> BenchRow:
    """All methods and densities together: prompt, compression and steps."""

    def total(side: int) -> Side:
        found = [pair[side] for pair in pairs]
        return Side(
            statistics.mean(one.accuracy for one in found),
            statistics.mean(one.bits_per_byte for one in found),
            sum(one.prefill_seconds for one in found),
            sum(one.step_seconds for one in found),
            sum(one.num_bytes for one in found),
        )

    ours, theirs = total(0), total(1)
    limit = len(pairs) * (dense.prefill_seconds + STEPS * min(DENSITIES) * dense.step_seconds)
    seconds = theirs.prefill_seconds + STEPS * theirs.step_seconds
    return BenchRow(
        bench="evict.kvpress",
        size=f"{len(pairs)} methods and budgets, {TIMED} tokens and {STEPS} steps; sums of kvpress: {theirs.text()}",
        ours=f"means and sums: {ours.text()}",
        baseline="kvpress",
        seconds=ours.prefill_seconds + STEPS * ours.step_seconds,
        baseline_seconds=seconds,
        limit_ratio=seconds / limit,
    )
