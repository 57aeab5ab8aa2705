"""Decoding with sparse activations: the layers of a wide Llama with random weights, against the dense model."""

import copy
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..activations.apply import apply_step, options_for
from ..measure.cost import decode_latency
from ..measure.flops import flops
from ..models.load import Loaded
from . import BenchRow

SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16}
VOCABULARY, PROMPT, TOKENS = 4096, 64, 16


def run() -> list[BenchRow]:
    """TEAL at 50 %, its thresholds and its counting included, batch 1, bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, **SIZES)
    dense = LlamaForCausalLM(config).bfloat16().eval()
    ids = torch.randint(VOCABULARY, (1, PROMPT))
    sparse = copy.deepcopy(dense)
    options = options_for("teal")(sparsity=0.5, allocation="uniform")
    applied = apply_step(Loaded(sparse, None, "random"), "teal", options, [ids])
    timings = decode_latency({"dense": dense, "teal": sparse}, ids, num_tokens=TOKENS, repeats=7, warmup=2).timings
    work = {name: flops(partial(_step, model, ids)) for name, model in (("dense", dense), ("teal", sparse))}
    kept = sum(applied.density().values()) / len(applied.density())
    return [
        BenchRow(
            bench="activations.teal50.decode",
            size=f"{SIZES['num_hidden_layers']} Llama layers, width {SIZES['hidden_size']}, {kept:.1%} of inputs kept",
            ours="teal, a token",
            baseline="dense, a token",
            seconds=timings["teal"].median / 1e3,
            baseline_seconds=timings["dense"].median / 1e3,
            limit_ratio=work["dense"] / work["teal"],
        )
    ]


def _step(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(ids[:, :1])
