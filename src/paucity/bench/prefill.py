"""Whole-model prefill: a policy with its selection against dense SDPA, at growing lengths: the crossover shows."""

import copy
from functools import partial

import torch

from ..attention.apply import apply
from ..attention.policy import PrefillPolicy
from ..attention.sink_window import SinkWindow
from ..attention.vertical_slash import VerticalSlash
from ..measure.cost import prefill, time_interleaved
from ..measure.data import held_out_python
from ..measure.flops import flops
from ..measure.tokens import encode, leading_ids
from ..models.load import load
from . import BenchRow

LENGTHS = (1024, 2048, 4096, 8192)
POLICIES: dict[str, PrefillPolicy] = {
    "sink_window": SinkWindow(min_length=0, num_sinks=64, window_size=512),
    "vertical_slash": VerticalSlash(min_length=0, vertical_share=0.05, slash_share=0.03),
}


def run() -> list[BenchRow]:
    """One row for each policy and length; all variants of a length take turns."""
    dense = load("embedded")
    tokenizer = dense.need_tokenizer("bench")
    text = torch.tensor([[*leading_ids(tokenizer), *encode(tokenizer, held_out_python())]])
    models = {"dense": dense.model}
    for name, policy in POLICIES.items():
        models[name] = copy.deepcopy(dense.model)
        apply(models[name], policy)
    rows = []
    for length in LENGTHS:
        ids = text[:, :length]
        variants = {name: partial(prefill, model, ids) for name, model in models.items()}
        timings = time_interleaved(variants, repeats=7, warmup=2).timings
        work = {name: flops(run) for name, run in variants.items()}
        rows += [
            BenchRow(
                bench=f"prefill.{name}.{length}",
                size=f"embedded model, {length} tokens, batch 1, bfloat16",
                ours=f"{name}, selection included",
                baseline="dense, causal SDPA",
                seconds=timings[name].median,
                baseline_seconds=timings["dense"].median,
                limit_ratio=work["dense"] / work[name],
            )
            for name in POLICIES
        ]
    return rows
