"""Decoding with packed weights: a Llama of 125 million random weights, end to end, against the dense model.

The weights are pruned by magnitude, 2:4 and 60 % of each layer, in copies of one model, and all decode greedily after
the same prompt, in turns. The baseline is that model, through transformers as it is and with its feed-forward layers
and norms compiled by ``torch.compile``, where there is a compiler; the faster one counts. The embedding is tied to the
output head and stays dense.
"""

import copy
import warnings

import torch
from torch import nn
from transformers import LlamaForCausalLM

from ..measure.cost import decode_latency
from ..measure.memory import weight_bytes
from ..models.load import Loaded
from ..weights import pack, prune
from . import BenchRow, llama125m

PROMPT, TOKENS, REPEATS = 64, 16, 9


def run() -> list[BenchRow]:
    """Rows of 2:4 and of 60 % in a bitmask."""
    dense = llama125m.llama125m()
    ids = torch.randint(dense.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    models: dict[str, nn.Module] = {"dense": dense}
    for name, pattern in (("nm24", {"n": 2, "m": 4}), ("bitmask60", {"sparsity": 0.6})):
        models[name] = copy.deepcopy(dense)
        prune(Loaded(models[name], None, "random"), "magnitude", **pattern)  # type: ignore[arg-type]
        pack(models[name], "nm" if name == "nm24" else "bitmask")
    baselines = {"transformers, bfloat16": "dense"}
    if (compiled := _compiled(dense, ids)) is not None:
        models["compiled"] = compiled
        baselines["transformers with compiled MLPs, bfloat16"] = "compiled"
    timings = decode_latency(models, ids, num_tokens=TOKENS, repeats=REPEATS, warmup=2)
    best = min(baselines, key=lambda how: timings.timings[baselines[how]].median)
    return [
        BenchRow(
            bench=f"packed.{name}",
            size=f"{sum(p.numel() for p in dense.parameters()) / 1e6:.0f} M-parameter Llama, batch 1",
            ours=f"{what} packed, a token",
            baseline=f"{best}, a token",
            seconds=timings.timings[name].median / 1e3,
            baseline_seconds=timings.timings[baselines[best]].median / 1e3,
            limit_ratio=weight_bytes(dense) / weight_bytes(models[name]),
        )
        for name, what in (("nm24", "2:4"), ("bitmask60", "60 % zeros, bitmask"))
    ]


def _compiled(dense: LlamaForCausalLM, ids: torch.Tensor) -> nn.Module | None:
    """A copy whose feed-forward layers and norms are compiled; None where this machine cannot compile."""
    model = copy.deepcopy(dense)
    compiled: nn.Module = model
    for layer in model.model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.compile()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decode_latency({"compiled": compiled}, ids, num_tokens=2, repeats=1)
    except Exception:  # no compiler, or one that fails: the plain model is the baseline then
        return None
    return compiled
