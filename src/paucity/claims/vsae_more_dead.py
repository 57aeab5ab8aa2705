"""Claim, a negative one of its paper: sampled codes drawn towards a standard normal leave more features dead.

Paper: Baker and Li 2025, https://arxiv.org/abs/2509.22994, on Pythia-70M against TopK.
"""

import time
from dataclasses import asdict, replace

from ..dictionary.sae import Rule
from ..dictionary.topk import TopK
from ..dictionary.variational import Variational
from . import CLAIMS, dictionaries
from .base import ClaimResult

NAME = "vsae-more-dead"


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Train TopK and vSAEs with learned variances on the same batches; in the first draw also with deviations 0 and 1.

    It holds if, in every draw, the vSAE with learned variances leaves a larger share of atoms without a code on the
    held-out tokens than TopK does, and more of the variance unexplained; the others are reported.

    Args:
        quick: less data, fewer atoms and one draw.
        seed: of the first draw; the others follow.
    """
    started = time.monotonic()
    sizes = replace(dictionaries.FULL, num_tokens=262_144)
    job = dictionaries.Embedded(NAME, dictionaries.QUICK if quick else sizes, seed=seed)
    draws = []
    for draw in job.seeds:
        k = job.sizes.k
        rules: dict[str, Rule] = {"topk": TopK(k), "vsae": Variational(k, seed=draw)}
        if not draws:
            rules |= {f"deviation_{one:g}": Variational(k, deviation=one, seed=draw) for one in (0.0, 1.0)}
        found = zip(rules, job.train(list(rules.values()), draw), strict=True)
        draws.append({name: asdict(job.kept(one, spliced=True)) for name, one in found})
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"direction": "far fewer living features than TopK, and lower explained variance"},
        measured={"draws": draws},
        holds=all(
            each["vsae"]["dead"] > each["topk"]["dead"] and each["vsae"]["fvu"] > each["topk"]["fvu"] for each in draws
        ),
        seconds=time.monotonic() - started,
        seed=seed,
        settings=job.settings() | {"window_of_dead": len(job.held_out), "kl": Variational().kl},
    )
