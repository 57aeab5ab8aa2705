"""Dense against sparse: the same prompts, texts and turns for both, and what each cost."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .attention import AppliedAttention, AppliedDecode, AppliedEviction, observe
from .checks import InputError, fail
from .kernels.dispatch import dense_runs
from .measure import cost, quality, retrieval
from .measure.continuation import continuation
from .measure.flops import flops
from .measure.memory import MEGABYTE, cache_bytes, peak_memory_mb
from .measure.prompts import TASKS
from .measure.tokens import context_length, encode, leading_ids
from .models.applied import Combined
from .models.load import Loaded
from .recipe import Measure, Recipe
from .report import AttentionLayer, Measurement, PrefillTime, Retrieval, picture_png

Stage = Callable[[str, Callable[[], Any]], Any]
"""Runs a measurement under a name and gives its JSON value; one that was done before is read back."""

Progress = Callable[[str], None]

MOST_OBSERVED = 8192
"""Tokens of the prompt of which the recall of attention is measured; it costs as much as dense attention, and more."""


@dataclass(frozen=True)
class Plan:
    """What is measured, cut to the context of the model.

    Attributes:
        measure: lengths that fit.
        retrieval: (task, length) pairs whose prompts fit.
        prompt: token ids ``[1, prefill_tokens]`` of the timed prompt.
        seed: of prompts and intervals.
        notes: what was cut or left out, one sentence each.
    """

    measure: Measure
    retrieval: tuple[tuple[str, int], ...]
    prompt: Tensor
    seed: int
    notes: tuple[str, ...]


def fit(recipe: Recipe, loaded: Loaded, text: str) -> Plan:
    """Cut the lengths of a recipe to the model's context, and try that every prompt can be built.

    Raises:
        InputError: if the text is too short, or a prompt does not fit a length that the recipe itself gives.
    """
    tokenizer, wanted, notes = loaded.need_tokenizer("run"), recipe.measure, []
    limit = context_length(loaded.model)
    cut = {}
    if limit is not None:
        if limit <= wanted.decode_tokens + 1:
            raise fail("run", "decode_tokens", f"be below the model's context ({limit}) by 2", wanted.decode_tokens)
        cut = {"length": min(wanted.length, limit), "prefill_tokens": min(wanted.prefill_tokens, limit)}
        cut["stride"] = min(wanted.stride, cut["length"])
    measure = wanted.model_copy(update=cut)
    for name in ("length", "prefill_tokens"):
        if getattr(measure, name) < getattr(wanted, name):
            notes.append(f"{name} was cut to the model's context of {limit} tokens.")
    filler, jobs = encode(tokenizer, text), []
    for task in wanted.retrieval.tasks:
        for length in sorted({min(n, limit or n) for n in wanted.retrieval.lengths}):
            try:
                rng = random.Random(recipe.seed)
                retrieval.build_prompt(tokenizer, TASKS[task](rng), filler, length, rng)
                jobs.append((task, length))
            except InputError as error:
                if length in wanted.retrieval.lengths:
                    raise
                notes.append(f"{task} was not measured in the model's context of {limit} tokens: {error}")
    return Plan(measure, tuple(jobs), _prompt(tokenizer, filler, measure.prefill_tokens), recipe.seed, tuple(notes))


def _prompt(tokenizer: PreTrainedTokenizerBase, filler: list[int], length: int) -> Tensor:
    """The text from its start, again and again where it is short."""
    if not filler:
        raise fail("run", "text", "have at least one token", 0)
    ids = [*leading_ids(tokenizer), *(filler * (length // len(filler) + 1))]
    return torch.tensor([ids[:length]])


def compare(
    plan: Plan, dense: Loaded, sparse: Loaded, applied: Combined, text: str, stage: Stage, on_progress: Progress
) -> tuple[Measurement, Measurement, dict[str, Any]]:
    """Measure both models.

    Args:
        plan: from `fit`.
        dense: the model as it came.
        sparse: a copy of it on which the steps are in force.
        applied: those steps, whose densities are counted while the text is evaluated.
        text: what is evaluated, and the haystack of the retrieval prompts.
        stage: keeps what is done.
        on_progress: told what is being done.

    Returns:
        (dense, sparse, ``{"num_tokens", "num_bytes", "density", "head_density", "notes", "dense_runs",
        "attention"}``; the notes are a list for each step; then how often a kernel ran dense, by reason, in what was
        evaluated and timed; and what the heads read, layer by layer).
    """
    tokenizer = dense.need_tokenizer("run")
    models = {"dense": dense.model, "sparse": sparse.model}
    fields: dict[str, dict[str, Any]] = {name: {"retrieval": []} for name in models}

    def evaluate(model: nn.Module, name: str) -> dict[str, Any]:
        def tell(done: int, total: int) -> None:
            on_progress(f"{name}: bits per byte, window {done} of {total}")

        applied.reset()
        with dense_runs() as ran_dense:
            found = _quality(plan, model, tokenizer, text, tell)
            if any(isinstance(step, AppliedDecode | AppliedEviction) for step in applied.steps):
                found["figures"] |= _decoded(plan, model, tokenizer, text)
        return found | _densities(applied) | {"dense_runs": ran_dense}

    evaluated = {}
    for name, model in models.items():
        evaluated[name] = stage(f"{name}.quality", partial(evaluate, model, name))
        fields[name] |= evaluated[name]["figures"]
    for task, length in plan.retrieval:
        for name, model in models.items():
            on_progress(f"{name}: {task} at {length} tokens")
            make = partial(_retrieval, plan, model, tokenizer, task, length, text)
            fields[name]["retrieval"].append(stage(f"{name}.{task}.{length}", make))
    on_progress("sparse: what the heads read")
    watched = stage("attention", partial(_attention, plan, applied))
    timed = stage("cost", partial(_costs, plan, models, on_progress))
    ran_dense = Counter(evaluated["sparse"]["dense_runs"]) + Counter(timed.pop("dense_runs"))
    for name in models:
        passkeys = [entry for entry in fields[name]["retrieval"] if entry["task"] == "passkey"]
        if passkeys:
            fields[name]["passkey_accuracy"] = max(passkeys, key=lambda entry: entry["length"])["accuracy"]
        fields[name] |= timed[name]
    facts = evaluated["sparse"] | {"dense_runs": ran_dense, "attention": watched}
    fields["sparse"]["density"] = facts["density"]
    fields["dense"]["density"] = dict.fromkeys(facts["density"], 1.0)
    return Measurement(**fields["dense"]), Measurement(**fields["sparse"]), facts


def _quality(
    plan: Plan, model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    found = quality.bits_per_byte(
        model,
        tokenizer,
        text,
        length=plan.measure.length,
        stride=plan.measure.stride,
        max_tokens=plan.measure.max_tokens,
        seed=plan.seed,
        on_progress=on_progress,
    )
    assert found.bits_per_byte is not None  # a text was given
    figures = {
        "bits_per_byte": found.bits_per_byte.value,
        "bits_per_byte_low": found.bits_per_byte.low,
        "bits_per_byte_high": found.bits_per_byte.high,
        "perplexity": found.perplexity.value,
    }
    return {"figures": figures, "num_tokens": found.num_tokens, "num_bytes": found.num_bytes}


def _decoded(plan: Plan, model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, Any]:
    """Quality of what is read from the cache, token by token, and the memory of the cache."""
    measure = plan.measure
    limit = context_length(model) or measure.prefill_tokens + measure.decoded_tokens
    context = min(measure.prefill_tokens, limit - measure.decoded_tokens)
    found = continuation(
        model,
        tokenizer,
        text,
        length=context + measure.decoded_tokens,
        num_tokens=measure.decoded_tokens,
        num_windows=measure.decoded_prompts,
        mode="generate",
        seed=plan.seed,
    )
    assert found.bits_per_byte is not None  # a text was given
    _, cache = cost.prefill(model, plan.prompt[:, :context])
    held = cache_bytes(cache) / MEGABYTE
    return {"decoded_bits_per_byte": found.bits_per_byte.value, "decoded_context": context, "cache_mb": held}


def _densities(applied: Combined) -> dict[str, Any]:
    """What the steps counted while the text was evaluated; attention says which prompts it left dense."""
    heads = [step.head_density().tolist() for step in applied.steps if hasattr(step, "head_density")]
    notes = [
        [f"Left dense {count} times while the text was evaluated: {why}." for why, count in dense.items()]
        for dense in (_left_dense(step.state()) for step in applied.steps)
    ]
    found = heads[-1] if heads and heads[-1] else None
    return {"density": applied.density(), "head_density": found, "notes": notes}


def _left_dense(state: dict[str, Any]) -> dict[str, int]:
    """What a step on attention left as it was, by reason."""
    found: dict[str, int] = next(
        (state[key] for key in ("dense_prompts", "dense_steps", "whole_caches") if key in state), {}
    )
    return found


def _attention(plan: Plan, applied: Combined) -> list[dict[str, Any]]:
    """What the steps on attention did to the timed prompt, layer by layer."""
    seen = [
        entry
        for step in applied.steps
        if isinstance(step, AppliedAttention)
        for entry in observe(step, plan.prompt[:, :MOST_OBSERVED], repeats=plan.measure.repeats)
    ]
    return [
        AttentionLayer(
            layer=entry.layer,
            tokens=entry.num_keys,
            density=entry.density.tolist(),
            recall=None if entry.recall is None else entry.recall.tolist(),
            output_error=entry.output_error.tolist(),
            select_ms=1000 * entry.select_seconds,
            sparse_ms=1000 * entry.seconds,
            dense_ms=1000 * entry.dense_seconds,
            pictures=[] if entry.picture is None else [picture_png(head.tolist()) for head in entry.picture],
        ).model_dump()
        for entry in seen
    ]


def _retrieval(
    plan: Plan, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: str, length: int, text: str
) -> dict[str, Any]:
    found = retrieval.retrieval_accuracy(
        model,
        tokenizer,
        task=task,
        length=length,
        filler=text,
        num_prompts=plan.measure.retrieval.num_prompts,
        seed=plan.seed,
    )
    entry = Retrieval(
        task=task,
        length=length,
        accuracy=found.accuracy.value,
        low=found.accuracy.value if found.accuracy.low is None else found.accuracy.low,
        high=found.accuracy.value if found.accuracy.high is None else found.accuracy.high,
        num_prompts=found.num_prompts,
    )
    return entry.model_dump()


def _costs(plan: Plan, models: dict[str, nn.Module], on_progress: Progress) -> dict[str, dict[str, Any]]:
    """Times in turns, FLOPs and memory of both models, and ``"dense_runs"``."""
    with dense_runs() as ran_dense:
        fields = _times(plan, models, on_progress)
    return fields | {"dense_runs": ran_dense}


def _times(plan: Plan, models: dict[str, nn.Module], on_progress: Progress) -> dict[str, dict[str, Any]]:
    measure, prompt = plan.measure, plan.prompt
    lengths = sorted({max(2, measure.prefill_tokens // share) for share in (4, 2, 1)})
    fields: dict[str, dict[str, Any]] = {name: {"prefill_ms_by_length": []} for name in models}
    for length in lengths:
        on_progress(f"prefill of {length} tokens, dense and sparse in turns")
        timings = cost.prefill_latency(models, prompt[:, :length], repeats=measure.repeats).timings
        for name, timing in timings.items():
            entry = PrefillTime(tokens=length, ms=timing.median, low=timing.min, high=timing.max)
            fields[name]["prefill_ms_by_length"].append(entry.model_dump())
            fields[name] |= {"prefill_tokens": length, "prefill_ms": timing.median}
            fields[name] |= {"prefill_ms_low": timing.min, "prefill_ms_high": timing.max}
    on_progress("decoding, dense and sparse in turns")
    limit = context_length(models["dense"]) or measure.prefill_tokens + measure.decode_tokens
    start = prompt[:, : limit - measure.decode_tokens]
    decoding = cost.decode_latency(models, start, num_tokens=measure.decode_tokens, repeats=measure.repeats)
    for name, timing in decoding.timings.items():
        fields[name] |= {"decode_ms_per_token": timing.median, "decode_ms_per_token_low": timing.min}
        fields[name]["decode_ms_per_token_high"] = timing.max
    for name, model in models.items():
        on_progress(f"{name}: FLOPs and memory of a prefill")
        run = partial(cost.prefill, model, prompt)
        fields[name] |= {"flops": float(flops(run)), "peak_memory_mb": peak_memory_mb(run, model=model)}
    return fields
