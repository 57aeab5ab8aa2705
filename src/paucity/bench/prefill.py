"""Prefill with sparse attention, selection included, against causal SDPA in the same run.

The best method is the fastest of those that answer passkey prompts of 4,096 and 8,192 tokens at least 95 % as well as
the dense model does, and that spend at most 15 % of their time on the choice (of all, where none does). The attention
part is timed on the queries, keys and values that the embedded model has on real text, all layers together; prompts
longer than its context of 8,192 tokens are timed, not answered. A random Llama of 100 M parameters has the shape of a
larger model, and no answers.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ..attention import Observed, PrefillPolicy, apply, from_json, record
from ..kernels.attention import Problem, dense
from ..measure.cost import Comparison, prefill, time_interleaved
from ..measure.data import held_out_python
from ..measure.flops import flops
from ..measure.retrieval import retrieval_accuracy
from ..measure.tokens import encode, leading_ids
from ..models.load import Loaded, load
from ..ops.formats.stripes import Window
from . import BenchRow

CROSSOVER = (256, 512, 1024, 2048, 4096, 8192)
LONG = (16384, 32768)
RANDOM = (4096, 8192, 16384, 32768)
ANSWERED, NUM_PROMPTS, KEPT, FINALISTS, MOST_CHOOSING = (4096, 8192), 10, 0.95, 3, 0.15
RANDOM_LLAMA = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "anchor": {"theta": 8.0, "step": 4},
    "block_sparse": {"q_block": 64, "local_blocks": 4, "sink_blocks": 1},
    "block_topk": {"num_blocks": 16, "force_first": True},
    "chunked_hierarchical": {"num_keys": 1024},
    "flash": {},
    "flexprefill": {"gamma": 0.9, "min_budget": 512},
    "grid": {"strides": [128, 256, 512], "num_vertical": 256, "window_size": 512},
    "hierarchical": {"k": 512},
    "hyper": {"exact_length": 1024},
    "neighbourhood": {"window_size": 576},
    "power": {"q_block": 64},
    "sharded": {"local_blocks": 8, "vert_stride": 4},
    "sink_window": {"num_sinks": 64, "window_size": 512},
    "tri_shape": {"num_sinks": 64, "window_size": 512, "num_last": 64},
    "vertical_slash": {"num_vertical": 512, "num_slash": 256},
    "xattention": {"stride": 16},
}
POLICIES = {
    name: policy
    for name, options in OPTIONS.items()
    if isinstance(policy := from_json({"method": name, "min_length": 0} | options), PrefillPolicy)
}


class Part(NamedTuple):
    """The attention of some layers: times, and for each policy the seconds of its choice and its share of the pairs."""

    times: Comparison
    select: dict[str, float]
    density: dict[str, float]


def run() -> list[BenchRow]:
    """Rows for each method and length, and for the best method at long prompts, attention alone and end to end."""
    loaded = load("embedded")
    tokenizer = loaded.need_tokenizer("bench")
    ids = torch.tensor([[*leading_ids(tokenizer), *encode(tokenizer, held_out_python())]])
    rows: list[BenchRow] = []
    part = None
    for length in CROSSOVER:
        part = attention_part(record(loaded.model, ids[:, :length]), POLICIES, repeats=5)
        rows += [_row(f"prefill.{name}.{length}", "embedded model", length, part, name) for name in POLICIES]
    assert part is not None
    shortest = {name: part.times.timings[name].median for name in POLICIES}
    sparse = sorted((name for name in POLICIES if part.density[name] < 1), key=lambda name: shortest[name])
    finalists = keep_answering(loaded, {name: POLICIES[name] for name in sparse}, FINALISTS)
    for length in LONG:
        part = attention_part(
            record(loaded.model, ids[:, :length]), {n: POLICIES[n] for n in finalists}, repeats=1 + (length <= LONG[0])
        )
        rows += [_row(f"prefill.{name}.{length}", "embedded model", length, part, name) for name in finalists]
        best = best_of(part)
        rows.append(_row(f"prefill.{length // 1024}k", "embedded model", length, part, best))
        if length == LONG[0]:
            rows += [_share(part, best, length), end_to_end(loaded.model, ids[:, :length], best, "embedded model")]
    return rows + _random_llama(ids, finalists)


@torch.no_grad()
def attention_part(seen: Sequence[Observed], policies: Mapping[str, PrefillPolicy], *, repeats: int = 3) -> Part:
    """Attention of all of ``seen``, with SDPA and with each policy in turns."""
    chosen: dict[str, list[float]] = {name: [] for name in policies}
    pairs: dict[str, float] = {}

    def exact() -> None:
        for query, key, value, prompt, _ in seen:
            dense.attention(query, key, value, Problem(Window(key.shape[2]), prompt.scale))

    def sparse(name: str) -> None:
        done = [policies[name].compute(*one[:4]) for one in seen]
        chosen[name].append(sum(one.select_seconds for one in done))
        pairs[name] = sum(float(one.kept.double().mean()) for one in done)

    times = time_interleaved({"dense": exact} | {name: partial(sparse, name) for name in policies}, repeats=repeats)
    total = sum(float(one.done.kept.double().mean()) for one in seen)
    select = {name: sorted(found[1:])[repeats // 2] for name, found in chosen.items()}
    return Part(times, select, {name: found / total for name, found in pairs.items()})


def keep_answering(loaded: Loaded, policies: Mapping[str, PrefillPolicy], most: int) -> list[str]:
    """The first ``most`` policies with which passkey prompts are answered `KEPT` as well as without, at each length.

    The answer is read with the prompt: further tokens, which are dense, would find it whatever the prompt had read.
    """
    tokenizer, text = loaded.need_tokenizer("bench"), held_out_python()
    ask = partial(
        retrieval_accuracy,
        loaded.model,
        tokenizer,
        task="passkey",
        filler=text,
        num_prompts=NUM_PROMPTS,
        mode="teacher_forced",
    )
    base = {length: ask(length=length).accuracy.value for length in ANSWERED}
    kept: list[str] = []
    for name, policy in policies.items():
        applied = apply(loaded.model, policy)
        try:
            if all(ask(length=length).accuracy.value >= KEPT * was for length, was in base.items()):
                kept.append(name)
        finally:
            applied.remove()
        if len(kept) == most:
            break
    return kept


def end_to_end(model: nn.Module, ids: Tensor, name: str, size: str, *, repeats: int = 3) -> BenchRow:
    """The whole prefill, dense and with a policy in turns."""
    models = {"dense": model, name: copy.deepcopy(model)}
    apply(models[name], POLICIES[name])
    runs = {which: partial(prefill, one, ids) for which, one in models.items()}
    times = time_interleaved(runs, repeats=repeats)
    return BenchRow(
        bench=f"prefill.{ids.shape[1] // 1024}k.end_to_end",
        size=f"{size}, {ids.shape[1]} tokens, whole prefill, bfloat16",
        ours=f"{name}, selection included",
        baseline="dense, causal SDPA",
        seconds=times.timings[name].median,
        baseline_seconds=times.timings["dense"].median,
        limit_ratio=flops(runs["dense"]) / flops(runs[name]),
    )


def best_of(part: Part) -> str:
    """The fastest that chooses within `MOST_CHOOSING` of its time; of all, where none does."""
    share = {name: part.select[name] / part.times.timings[name].median for name in part.select}
    return max([name for name in share if share[name] <= MOST_CHOOSING] or list(share), key=part.times.speedup)


def _row(bench: str, size: str, length: int, part: Part, name: str) -> BenchRow:
    share = part.select[name] / part.times.timings[name].median
    return BenchRow(
        bench=bench,
        size=f"{size}, attention part, {length} tokens, bfloat16, {part.density[name]:.3f} of the pairs",
        ours=f"{name}, selection included ({share:.0%})",
        baseline="causal SDPA",
        seconds=part.times.timings[name].median,
        baseline_seconds=part.times.timings["dense"].median,
        limit_ratio=1 / part.density[name],
    )


def _share(part: Part, name: str, length: int) -> BenchRow:
    """The time of the choice against that of the whole sparse attention: a ratio of 6.7 is a share of 15 %."""
    seconds, whole = part.select[name], part.times.timings[name].median
    return BenchRow(
        bench="prefill.selection_share",
        size=f"embedded model, {length} tokens: selection is {seconds / whole:.1%} of the sparse attention's time",
        ours=f"selection of {name}",
        baseline=f"sparse attention of {name}, selection included",
        seconds=seconds,
        baseline_seconds=whole,
        limit_ratio=whole / seconds,
    )


def _random_llama(ids: Tensor, names: Sequence[str]) -> list[BenchRow]:
    """The best of these policies in one layer of a larger model at each length, and in all of it at 8,192 tokens."""
    model, rows = _llama(RANDOM_LLAMA), []
    size = f"random Llama, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters"
    layer = _llama(RANDOM_LLAMA | {"num_hidden_layers": 1})
    policies = {name: POLICIES[name] for name in names}
    for length in RANDOM:
        part = attention_part(record(layer, ids[:, :length]), policies, repeats=1 + (length <= LONG[0]))
        best = best_of(part)
        rows.append(_row(f"prefill.llama100m.{length}", f"{size}, one layer", length, part, best))
        if length == RANDOM[1]:
            whole = end_to_end(model, ids[:, :length], best, size, repeats=1)
            rows.append(replace(whole, bench=whole.bench.replace("prefill.", "prefill.llama100m.")))
    return rows


def _llama(sizes: dict[str, int]) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=max(RANDOM))
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()
