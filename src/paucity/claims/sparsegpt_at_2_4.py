"""Claim: at 2:4 SparseGPT keeps a language model better than Wanda and magnitude do, and all lose more than at 50 %.

Paper: Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774, Table 1; figures of LLaMA-2-7B with Wanda from Sun
et al. 2023, https://arxiv.org/abs/2306.11695, Table 3.
"""

import time

from ..models.load import Loaded
from . import CLAIMS
from .base import ClaimResult
from .pruned import Pruned, perplexities

NAME = "sparsegpt-at-2-4"
METHODS = ("magnitude", "wanda", "sparsegpt")


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Prune with each method at 2:4 and at 50 %, with several draws of calibration text.

    It holds if in every draw SparseGPT loses less than both others at 2:4, and each method loses more at 2:4 than at
    50 %.

    Args:
        quick: less calibration and a shorter text.
        seed: of the first draw; the others follow.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    job = Pruned(NAME, quick=quick, seed=seed, draws=3, loaded=loaded)
    dense = job.measure()
    found = {
        method: {
            "2:4": [job.quality(method, draw, {"n": 2, "m": 4}) for draw in job.seeds],
            "50 %": [job.quality(method, draw, {"sparsity": 0.5}) for draw in job.seeds],
        }
        for method in METHODS
    }
    nats = {
        method: {label: [quality.nats_per_token.value for quality in values] for label, values in both.items()}
        for method, both in found.items()
    }
    best = all(
        mine < other
        for method in METHODS[:2]
        for mine, other in zip(nats["sparsegpt"]["2:4"], nats[method]["2:4"], strict=True)
    )
    harder = all(a > b for both in nats.values() for a, b in zip(both["2:4"], both["50 %"], strict=True))
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={
            "LLaMA-2-7B perplexity": {
                "dense": 5.12,
                "2:4": {"magnitude": 54.59, "wanda": 11.02, "sparsegpt": 10.17},
                "50 %": {"magnitude": 14.89, "wanda": 6.42, "sparsegpt": 6.51},
            }
        },
        measured={
            "perplexity": {
                "dense": dense.perplexity.value,
                **{
                    label: {method: perplexities(both[label]) for method, both in found.items()}
                    for label in ("2:4", "50 %")
                },
            },
            "sparsegpt_is_best": best,
            "2_4_is_harder": harder,
        },
        holds=best and harder,
        seconds=time.monotonic() - started,
        seed=seed,
        settings=job.settings(),
    )
