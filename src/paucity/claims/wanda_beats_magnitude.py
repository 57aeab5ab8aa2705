"""Claim: at 50 % Wanda keeps a language model better than magnitude pruning does.

Paper: Sun et al. 2023, https://arxiv.org/abs/2306.11695, Table 3.
"""

import random
import time

from ..measure.data import held_out_python, python_documents
from ..measure.quality import Quality, bits_per_byte
from ..models.calibration import calibration_batches
from ..models.load import Loaded, load
from ..weights.apply import apply_step, options_for
from . import CLAIMS
from .base import ClaimResult

NAME = "wanda-beats-magnitude"
SPARSITY = 0.5
NUM_DOCUMENTS = 60


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Prune with both scores, Wanda with several draws of calibration text, and measure on text never trained on.

    Args:
        quick: less calibration and a shorter text.
        seed: of the first draw; the others follow.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    tokenizer = loaded.need_tokenizer(NAME)
    seeds = list(range(seed, seed + (2 if quick else 5)))
    samples, max_tokens = (16, 8192) if quick else (64, 32768)
    documents = random.Random(seed).sample(python_documents(include_tests=False), NUM_DOCUMENTS)
    text, held_out = "\n".join(documents), held_out_python()

    def measure() -> Quality:
        return bits_per_byte(loaded.model, tokenizer, held_out, length=1024, stride=512, max_tokens=max_tokens)

    def pruned(method: str, draw: int) -> Quality:
        batches = calibration_batches(tokenizer, text, num_samples=samples, length=512, seed=draw)
        applied = apply_step(loaded, method, options_for(method)(sparsity=SPARSITY), batches)
        try:
            return measure()
        finally:
            applied.remove()

    dense, magnitude = measure(), pruned("magnitude", seed)
    wanda = [pruned("wanda", draw) for draw in seeds]
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"LLaMA-7B perplexity": {"dense": 5.68, "magnitude": 17.29, "wanda": 7.26}},
        measured={
            "perplexity": {
                "dense": dense.perplexity.value,
                "magnitude": magnitude.perplexity.value,
                "wanda": [quality.perplexity.value for quality in wanda],
            },
            "nats_per_token": {
                "dense": dense.nats_per_token.value,
                "magnitude": magnitude.nats_per_token.value,
                "wanda": [quality.nats_per_token.value for quality in wanda],
            },
        },
        holds=all(quality.nats_per_token.value < magnitude.nats_per_token.value for quality in wanda),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "sparsity": SPARSITY,
            "scope": {"magnitude": "layer", "wanda": "row"},
            "calibration": {
                "text": f"{NUM_DOCUMENTS} modules of python",
                "num_samples": samples,
                "length": 512,
                "seeds": seeds,
            },
            "text": "held_out_python",
            "num_tokens": dense.num_tokens,
            "length": 1024,
            "stride": 512,
        },
    )
