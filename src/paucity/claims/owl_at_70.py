"""Claim: at 70 % layers with more outliers have to stay denser: OWL's ratios beat uniform ones.

Paper: Yin et al. 2023, https://arxiv.org/abs/2310.05175, Table 2, on LLaMA-7B at 70 % with Wanda and SparseGPT.
"""

import time

from ..models.load import Loaded
from . import CLAIMS
from .base import ClaimResult
from .pruned import Pruned, perplexities

NAME = "owl-at-70"
SPARSITY = 0.7
METHODS = ("wanda", "sparsegpt")


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Prune with both methods at 70 %, uniformly, by OWL and by the shape-based ERK.

    It holds if OWL beats uniform ratios with Wanda and with SparseGPT in every draw; ERK is reported.

    Args:
        quick: less calibration and a shorter text.
        seed: of the first draw; the others follow.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    job = Pruned(NAME, quick=quick, seed=seed, draws=3, loaded=loaded)
    dense = job.measure()
    allocations = ("uniform", "owl") if quick else ("uniform", "owl", "erk")
    figures = {
        method: {
            allocation: perplexities(
                [job.quality(method, draw, {"sparsity": SPARSITY, "allocation": allocation}) for draw in job.seeds]
            )
            for allocation in allocations
        }
        for method in METHODS
    }
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={
            "LLaMA-7B perplexity at 70 %": {
                "wanda": {"uniform": 85.77, "owl": 24.55},
                "sparsegpt": {"uniform": 26.30, "owl": 19.49},
            }
        },
        measured={"dense": dense.perplexity.value, "perplexity": figures},
        holds=all(
            owl < uniform
            for method in METHODS
            for owl, uniform in zip(figures[method]["owl"], figures[method]["uniform"], strict=True)
        ),
        seconds=time.monotonic() - started,
        seed=seed,
        settings=job.settings() | {"sparsity": SPARSITY},
    )
