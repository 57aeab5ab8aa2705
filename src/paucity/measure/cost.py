"""How long variants take, measured in turns so that a machine that slows down slows all of them."""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import InputTypeError, check_int, check_ndim, check_range, fail
from .tokens import Progress, check_context, device_of, evaluating, forward


@dataclass(frozen=True)
class Timing:
    """Durations of one variant, round by round, in the unit that the measuring function states."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.values)

    @property
    def min(self) -> float:
        """Shortest."""
        return min(self.values)

    @property
    def max(self) -> float:
        """Longest."""
        return max(self.values)

    def scaled(self, factor: float) -> "Timing":
        """The same in another unit."""
        return Timing(tuple(value * factor for value in self.values))


@dataclass(frozen=True)
class Comparison:
    """Timings of variants that took turns; the first is the baseline that ratios divide by."""

    timings: dict[str, Timing]

    def speedup(self, name: str) -> float:
        """Median of the baseline over the median of ``name``; above 1 is faster than the baseline."""
        return self._baseline().median / self._timing(name).median

    def paired_speedup(self, name: str) -> float:
        """Median over the rounds of baseline over ``name`` within the round, where slow spells cancel."""
        pairs = zip(self._baseline().values, self._timing(name).values, strict=True)
        return statistics.median(base / value for base, value in pairs)

    def scaled(self, factor: float) -> "Comparison":
        """The same in another unit."""
        return Comparison({name: timing.scaled(factor) for name, timing in self.timings.items()})

    def _baseline(self) -> Timing:
        return next(iter(self.timings.values()))

    def _timing(self, name: str) -> Timing:
        if name not in self.timings:
            raise fail("Comparison", "name", f"be one of {', '.join(self.timings)}", name)
        return self.timings[name]


def time_interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    on_progress: Progress | None = None,
) -> Comparison:
    """Seconds that each variant takes, in rounds of one call each; every round starts with another variant.

    Args:
        variants: functions by name, the baseline first; what they return is dropped. Work on a GPU is waited for.
        repeats: rounds measured.
        warmup: rounds run before and not measured.
        prepare: functions by variant, run before each call of the variant and not measured.
        on_progress: called with (rounds done, rounds in all).

    Raises:
        InputError: if there is no variant, or ``prepare`` names one that is not there.
    """
    check_int("time_interleaved", "repeats", repeats)
    check_int("time_interleaved", "warmup", warmup, 0)
    if not variants:
        raise fail("time_interleaved", "variants", "hold at least one function", "none")
    for name in prepare or {}:
        if name not in variants:
            raise fail("time_interleaved", "prepare", f"name one of {', '.join(variants)}", name)
    names, seconds = list(variants), {name: list[float]() for name in variants}
    collecting = gc.isenabled()
    try:
        for turn in range(warmup + repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if prepare is not None and name in prepare:
                    prepare[name]()
                gc.collect(1)  # what the last call left; a full collection takes longer than many a call
                gc.disable()
                _synchronize()
                started = time.perf_counter()
                variants[name]()
                _synchronize()
                elapsed = time.perf_counter() - started
                if collecting:
                    gc.enable()
                if turn >= warmup:
                    seconds[name].append(elapsed)
            if on_progress is not None:
                on_progress(turn + 1, warmup + repeats)
    finally:
        if collecting:
            gc.enable()
    return Comparison({name: Timing(tuple(values)) for name, values in seconds.items()})


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def prefill(model: nn.Module, ids: Tensor) -> tuple[Tensor, Any]:
    """Run the prompt ``ids [B, T]``: logits of the last token ``[B, 1, vocab]`` and the cache."""
    with evaluating(model):
        return forward(model, ids.to(device_of(model)), keep=1, use_cache=True)


def decode(model: nn.Module, logits: Tensor, cache: Any, num_tokens: int) -> Tensor:
    """Greedy decoding after `prefill`, one cached step a token; the cache grows in place.

    Returns:
        int64 ``[B, num_tokens]``, the tokens that the steps read: the first is the likeliest after the prompt.
    """
    check_int("decode", "num_tokens", num_tokens)
    tokens = []
    with evaluating(model):
        for _ in range(num_tokens):
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
            logits, cache = forward(model, tokens[-1], keep=1, cache=cache, use_cache=True)
            if cache is None:
                raise fail("decode", "model", "return a cache (past_key_values)", type(model).__name__)
    return torch.cat(tokens, dim=1)


def prefill_latency(
    models: Mapping[str, nn.Module],
    ids: Tensor,
    *,
    repeats: int = 5,
    warmup: int = 1,
    on_progress: Progress | None = None,
) -> Comparison:
    """Milliseconds of a prefill of ``ids [B, T]``: the cache filled and the logits of the last token alone.

    ``models`` are separate models by name, the baseline first; the rest is as in `time_interleaved`.

    Raises:
        InputError: if ``ids`` is empty or longer than a model's context.
    """
    _check_prompt("prefill_latency", models, ids, 0)
    variants = {name: functools.partial(prefill, model, ids) for name, model in models.items()}
    return time_interleaved(variants, repeats=repeats, warmup=warmup, on_progress=on_progress).scaled(1e3)


def decode_latency(
    models: Mapping[str, nn.Module],
    ids: Tensor,
    *,
    num_tokens: int = 16,
    repeats: int = 5,
    warmup: int = 1,
    on_progress: Progress | None = None,
) -> Comparison:
    """Milliseconds per token of ``num_tokens`` greedy cached steps after a prefill of ``ids [B, T]``.

    Each round prefills anew, unmeasured, so that every round decodes at the same length. Arguments are as in
    `prefill_latency`, and prompt and tokens together must fit the context.
    """
    check_int("decode_latency", "num_tokens", num_tokens)
    _check_prompt("decode_latency", models, ids, num_tokens)
    filled: dict[str, tuple[Tensor, Any]] = {}

    def fill(name: str) -> None:
        filled[name] = prefill(models[name], ids)

    def step(name: str) -> None:
        decode(models[name], *filled.pop(name), num_tokens)

    comparison = time_interleaved(
        {name: functools.partial(step, name) for name in models},
        repeats=repeats,
        warmup=warmup,
        prepare={name: functools.partial(fill, name) for name in models},
        on_progress=on_progress,
    )
    return comparison.scaled(1e3 / num_tokens)


def _check_prompt(function: str, models: Mapping[str, nn.Module], ids: Tensor, num_tokens: int) -> None:
    check_ndim(function, "ids", ids, 2)
    check_range(function, "length of ids", ids.shape[1], 1)
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"{function}: models must hold modules, got {type(model).__name__} for {name}.")
        check_context(function, "tokens", model, ids.shape[1] + num_tokens)
