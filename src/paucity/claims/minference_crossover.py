"""Claim: sparse prefill is slower than dense on short prompts and faster on long ones.

Paper: Jiang et al. 2024 (MInference), https://arxiv.org/abs/2407.02490, the latency figures: on an A100 and a model of
8 billion parameters it loses at 10 thousand tokens and wins from about 50 thousand on. Where the lines cross depends
on machine and kernels; the claim is that they cross once. Measured here is the attention of all layers on the model's
own queries, keys and values, vertical-slash with its selection included against PyTorch's causal attention, in turns.
The budget is one with which the model still finds a passkey, measured beside it, dense and sparse.

Differences: attention alone, where the paper times the whole prefill, whose other parts are the same in both; one head
type for all heads; and the model is small, so that the lengths are shorter.
"""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..attention import VerticalSlash, apply, record, to_json
from ..kernels import dispatch
from ..measure.cost import time_interleaved
from ..measure.data import held_out_python
from ..measure.tokens import context_length, encode
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult
from .forced import forced_accuracy

NAME = "minference-crossover"
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
POLICY = VerticalSlash(vertical_share=0.06, slash_share=0.03, min_length=0)
PASSKEY_LENGTH, PASSKEY_LOSS = 4096, 0.05


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Time both at lengths from 128 tokens to the model's context.

    Args:
        quick: one text and few rounds instead of three texts and more.
        seed: of the places of the texts and of the passkeys.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    tokenizer, text = loaded.need_tokenizer(NAME), held_out_python()
    tokens = torch.tensor(encode(tokenizer, text))
    longest = min(len(tokens), context_length(loaded.model) or LENGTHS[-1], LENGTHS[-1])
    lengths = [length for length in LENGTHS if length <= longest]
    num_texts, repeats, num_prompts = (1, 3, 6) if quick else (3, 7, 20)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(tokens) - lengths[-1] + 1, (num_texts,), generator=generator).tolist()
    by_text = [_times(loaded.model, tokens[at : at + lengths[-1]], lengths, repeats) for at in places]
    rows = [
        {key: statistics.median(row[key] for row in each) for key in each[0]} for each in zip(*by_text, strict=True)
    ]
    ratios = [row["speedup"] for row in rows]
    crossover = _crossover(lengths, ratios)
    # A prompt and its answer must fit the context.
    length = min(PASSKEY_LENGTH, lengths[-1])
    passkey = {}
    for name in ("dense", "sparse"):
        applied = apply(loaded.model, POLICY) if name == "sparse" else None
        try:
            found = forced_accuracy(loaded, ("passkey",), text, length=length, num_prompts=num_prompts, seed=seed)
            passkey[name] = found["passkey"]
        finally:
            if applied is not None:
                applied.remove()
    kept = passkey["sparse"] >= passkey["dense"] - PASSKEY_LOSS
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={
            "speedup of the prefill by thousands of tokens": {"10": 0.35, "50": 1.13, "100": 1.78, "1000": 9.9}
        },
        measured={
            "crossover_length": crossover,
            "speedup": dict(zip(map(str, lengths), ratios, strict=True)),
            "by_length": [{"length": length, **row} for length, row in zip(lengths, rows, strict=True)],
            "passkey": {"length": length, **passkey},
        },
        holds=crossover is not None and kept,
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "text": "held_out_python",
            "policy": to_json(POLICY),
            "baseline": "scaled_dot_product_attention, causal",
            "num_texts": num_texts,
            "repeats": repeats,
            "passkeys": num_prompts,
            "threads": torch.get_num_threads(),
            "kernels": {name: dispatch.status()[name] for name in ("sparse attention", "lines")},
        },
    )


def _times(model: nn.Module, ids: Tensor, lengths: Sequence[int], repeats: int) -> list[dict[str, float]]:
    """Milliseconds of all layers at each length: causal, so that the start of a text is what a short text would be."""
    layers = record(model, ids.unsqueeze(0))
    rows = []
    for length in lengths:
        parts = [(*(x[:, :, :length].contiguous() for x in qkv), prompt) for *qkv, prompt, _ in layers]
        selection: list[float] = []
        density: list[float] = []

        def dense(parts: Sequence[Any] = parts) -> None:
            for q, k, v, prompt in parts:
                scaled_dot_product_attention(q, k, v, is_causal=True, scale=prompt.scale, enable_gqa=True)

        def sparse(parts: Sequence[Any] = parts, spent: list[float] = selection, share: list[float] = density) -> None:
            done = [POLICY.compute(*part) for part in parts]
            spent.append(sum(one.select_seconds for one in done))
            pairs = parts[0][0].shape[2] * (parts[0][0].shape[2] + 1) / 2
            share.append(statistics.mean(float(one.kept.double().mean()) / pairs for one in done))

        with torch.no_grad():
            timed = time_interleaved({"dense": dense, "sparse": sparse}, repeats=repeats, warmup=1)
        both = {name: timing.median * 1e3 for name, timing in timed.timings.items()}
        rows.append(
            {
                "dense_ms": both["dense"],
                "sparse_ms": both["sparse"],
                "selection_ms": statistics.median(selection[1:]) * 1e3,
                "density": density[-1],
                "speedup": timed.paired_speedup("sparse"),
            }
        )
    return rows


def _crossover(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
    """The length at which the ratio passes 1, once and upwards, on a line in logarithms; None where it does not."""
    slower = sum(ratio < 1 for ratio in ratios)
    if not 0 < slower < len(ratios) or any(ratio < 1 for ratio in ratios[slower:]):
        return None
    (low, high), (before, after) = ((math.log(x) for x in pair[slower - 1 : slower + 1]) for pair in (lengths, ratios))
    return math.exp(low + (high - low) * -before / (after - before))
