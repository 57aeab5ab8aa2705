"""Claim: trained twice, RA-SAE finds nearly the same atoms, where TopK finds others, and reconstructs as well.

Paper: Fel et al. 2025, https://arxiv.org/abs/2502.12892, Table 1: stability over trainings on five vision models.
"""

import time
from itertools import combinations
from typing import Any

from torch import Tensor

from ..dictionary.archetypal import Archetypal, kmeans_centroids
from ..dictionary.sources import TensorSource
from ..dictionary.topk import TopK
from ..ops.matching import matched_cosines
from . import CLAIMS, dictionaries
from .base import ClaimResult

NAME = "ra-sae-stability"
CENTROIDS = 2
MORE_ERROR = 0.05
RATE = 1e-2
"""Of RA-SAE; with it, as with `dictionaries.LEARNING_RATE` for TopK, errors were least of those that were tried."""


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Train TopK and RA-SAE with several seeds on a model's activations, and match the atoms of each two.

    RA-SAE is trained on centroids that are found once, as in the paper, and on ones that each seed finds for itself.
    It holds if every two RA-SAEs of either kind are more alike (mean cosine of a Hungarian match) than any two TopK
    are, and RA-SAE with shared centroids leaves at most ``MORE_ERROR`` of the variance more than TopK does.

    The mean of the activations is taken off for both. TopK has an offset, which in the official code it has not, and
    RA-SAE has none: what is common to all activations would cost it entries, and make any two of its atoms alike.

    Args:
        quick: less data, smaller dictionaries.
        seed: of the first draw; the others follow.
    """
    started = time.monotonic()
    sizes = dictionaries.Sizes(
        text_tokens=65_536, held_out_tokens=16_384, num_tokens=393_216, batch_size=512, dict_size=512
    )
    if quick:
        sizes = dictionaries.Sizes(
            text_tokens=8_192, held_out_tokens=4_096, num_tokens=32_768, batch_size=512, dict_size=128, k=8, seeds=2
        )
    job = dictionaries.Embedded(NAME, sizes, seed=seed)
    mean = job.activations.mean(0)
    job.activations, job.held_out = job.activations - mean, job.held_out - mean
    count = CENTROIDS * sizes.dict_size
    shared = kmeans_centroids(job.activations, count, seed=seed)
    atoms: dict[str, list[Tensor]] = {"topk": [], "shared": [], "own": []}
    fvu: dict[str, list[float]] = {"topk": [], "shared": [], "own": []}
    for draw in job.seeds:
        (topk,) = job.train([TopK(sizes.k)], draw)
        atoms["topk"].append(topk.atoms.detach())
        fvu["topk"].append(job.kept(topk).fvu)
        for name in ("shared", "own"):
            one = Archetypal(
                job.activations.shape[1], sizes.dict_size, sizes.k, num_centroids=count, delta=1.0, seed=draw
            )
            one.fit(
                TensorSource(job.activations, seed=draw),
                centroids=shared if name == "shared" else kmeans_centroids(job.activations, count, seed=1 + draw),
                num_tokens=sizes.num_tokens,
                batch_size=sizes.batch_size,
                learning_rate=RATE,
            )
            atoms[name].append(one.atoms.detach())
            fvu[name].append(job.kept(one).fvu)
    alike = {name: _alike(each) for name, each in atoms.items()}
    error = {name: sum(each) / len(each) for name, each in fvu.items()}
    measured: dict[str, Any] = {"stability": alike, "fvu": fvu}
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"direction": "RA-SAE far more stable than TopK on all models, at about its reconstruction"},
        measured=measured,
        holds=min(alike["shared"] + alike["own"]) > max(alike["topk"])
        and error["shared"] <= error["topk"] + MORE_ERROR,
        seconds=time.monotonic() - started,
        seed=seed,
        settings=job.settings()
        | {"num_centroids": count, "delta": 1.0, "ra_sae_learning_rate": RATE, "more_error": MORE_ERROR},
    )


def _alike(atoms: list[Tensor]) -> list[float]:
    return [float(matched_cosines(one, other, signed=True).mean()) for one, other in combinations(atoms, 2)]
