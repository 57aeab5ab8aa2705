"""Claim: neurons shared out by CFSP's coarse importance keep a model better than equal shares, at equal sparsity.

Paper: Wang et al. 2024, https://arxiv.org/abs/2409.13199, Table 1. The fine score is the same for both, so that the
allocation alone differs; magnitude and random neurons, with equal shares, are the controls. The paper's recovery, ranks
of adapters by importance against equal ranks of the same total, is measured beside it where ``peft`` is installed; it
does not decide.
"""

import importlib.util
import random
import time
from typing import Any

from ..measure.data import held_out_python, python_documents
from ..measure.quality import bits_per_byte
from ..models.calibration import calibration_batches
from ..models.load import Loaded, load
from ..weights.apply import apply_step, options_for
from . import CLAIMS
from .base import ClaimResult

NAME = "cfsp-beats-uniform"
SPARSITIES = (0.2, 0.35, 0.5)
RECOVERED = 0.5
NUM_DOCUMENTS = 60


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Prune with several draws of calibration text and measure on text never trained on.

    Args:
        quick: one sparsity, less calibration, a shorter text and no recovery.
        seed: of the first draw; the others follow.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded", dtype="float32")
    tokenizer = loaded.need_tokenizer(NAME)
    seeds = list(range(seed, seed + (2 if quick else 3)))
    sparsities = SPARSITIES[-1:] if quick else SPARSITIES
    samples, max_tokens = (8, 4096) if quick else (16, 8192)
    documents = random.Random(seed).sample(python_documents(include_tests=False), NUM_DOCUMENTS)
    text, held_out = "\n".join(documents), held_out_python()

    def measure() -> float:
        found = bits_per_byte(loaded.model, tokenizer, held_out, length=1024, stride=1024, max_tokens=max_tokens)
        return found.nats_per_token.value

    def pruned(method: str, draw: int, **options: Any) -> float:
        batches = calibration_batches(tokenizer, text, num_samples=samples, length=256, seed=draw)
        applied = apply_step(loaded, method, options_for(method).model_validate(options), batches)
        try:
            return measure()
        finally:
            applied.remove()

    dense = measure()
    nats: dict[str, dict[str, Any]] = {}
    for sparsity in sparsities:
        nats[f"{sparsity:g}"] = {
            "cfsp": [pruned("cfsp", draw, sparsity=sparsity) for draw in seeds],
            "uniform": [pruned("cfsp", draw, sparsity=sparsity, sharpness=0.0) for draw in seeds],
            "magnitude": pruned("neurons", seed, sparsity=sparsity, score="magnitude"),
            "random": pruned("neurons", seed, sparsity=sparsity, score="random", seed=seed),
        }
    recovered: dict[str, float] = {}
    if not quick and importlib.util.find_spec("peft"):
        for ranks in ("adaptive", "uniform"):
            recovery = {"ranks": ranks, "steps": 24, "batch_size": 4, "rank": 4, "learning_rate": 1e-3, "seed": seed}
            recovery["text"] = "python"
            recovered[ranks] = pruned("cfsp", seed, sparsity=RECOVERED, recovery=recovery)
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"note": "better than Magnitude-SP, Wanda-SP and FLAP on LLaMA and Qwen models at 20 and 50 %"},
        measured={"nats_per_token": {"dense": dense, **nats}, "recovered_nats_per_token": recovered},
        holds=all(
            cfsp < equal and cfsp < row["magnitude"]
            for row in nats.values()
            for cfsp, equal in zip(row["cfsp"], row["uniform"], strict=True)
        ),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "sparsity of neurons": list(sparsities),
            "recovery": {"sparsity": RECOVERED, "steps": 24, "batch": [4, 256], "mean rank": 4, "text": "python"},
            "calibration": {
                "text": f"{NUM_DOCUMENTS} modules of python",
                "num_samples": samples,
                "length": 256,
                "seeds": seeds,
            },
            "text": "held_out_python",
            "max_tokens": max_tokens,
            "length": 1024,
        },
    )
