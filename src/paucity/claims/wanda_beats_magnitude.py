"""Claim: at 50 % Wanda keeps a language model better than magnitude pruning does.

Paper: Sun et al. 2023, https://arxiv.org/abs/2306.11695, Table 3.
"""

import time

from ..models.load import Loaded
from . import CLAIMS
from .base import ClaimResult
from .pruned import Pruned, perplexities

NAME = "wanda-beats-magnitude"
SPARSITY = 0.5


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Prune with both scores, Wanda with several draws of calibration text, and measure on text never trained on.

    Args:
        quick: less calibration and a shorter text.
        seed: of the first draw; the others follow.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    job = Pruned(NAME, quick=quick, seed=seed, draws=5, loaded=loaded)
    dense, options = job.measure(), {"sparsity": SPARSITY}
    magnitude = job.quality("magnitude", seed, options)
    wanda = [job.quality("wanda", draw, options) for draw in job.seeds]
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"LLaMA-7B perplexity": {"dense": 5.68, "magnitude": 17.29, "wanda": 7.26}},
        measured={
            "perplexity": {
                "dense": dense.perplexity.value,
                "magnitude": magnitude.perplexity.value,
                "wanda": perplexities(wanda),
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
        settings=job.settings() | {"sparsity": SPARSITY, "scope": {"magnitude": "layer", "wanda": "row"}},
    )
