"""Claim: entries shared over a batch, with aux_zipf_loss, leave fewer dead features than TopK does with AuxK.

Paper: Ayonrinde 2024, https://arxiv.org/abs/2411.02124, on activations of GPT-2 small.
"""

import time
from dataclasses import asdict, replace

from ..dictionary.feature_choice import FeatureChoice
from ..dictionary.mutual_choice import MutualChoice
from ..dictionary.sae import Rule
from ..dictionary.topk import TopK
from . import CLAIMS, dictionaries
from .base import ClaimResult

NAME = "mutual-feature-choice-fewer-dead"
CHOICES = ("mutual_choice", "feature_choice")
RATE = 0.1  # of running means: a training as short as this one is over before slower ones have settled


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Train TopK, Mutual choice and Feature choice with many more atoms than dimensions on the same batches.

    It holds if, in every draw, both choices leave a smaller share of atoms without a code on the held-out tokens than
    TopK does and less of the variance unexplained, with at most a tenth more entries a token.

    Args:
        quick: less data, fewer atoms and one draw.
        seed: of the first draw; the others follow.
    """
    started = time.monotonic()
    sizes = dictionaries.QUICK if quick else replace(dictionaries.FULL, num_tokens=262_144)
    sizes = replace(sizes, batch_size=1024, dict_size=2048 if quick else 4096)  # a batch has to hold rare features
    job = dictionaries.Embedded(NAME, sizes, seed=seed)
    draws = []
    for draw in job.seeds:
        k = job.sizes.k
        rules: dict[str, Rule] = {
            "topk": TopK(k),
            "mutual_choice": MutualChoice(k, rate=RATE),
            "feature_choice": FeatureChoice(k, rate=RATE),
        }
        found = zip(rules, job.train(list(rules.values()), draw), strict=True)
        draws.append({name: asdict(job.kept(one, spliced=True)) for name, one in found})
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"direction": "no dead features with Feature choice, fewer with Mutual choice, and lower error"},
        measured={"draws": draws},
        holds=all(
            each[name]["dead"] < each["topk"]["dead"]
            and each[name]["fvu"] < each["topk"]["fvu"]
            and each[name]["l0"] < 1.1 * each["topk"]["l0"]
            for each in draws
            for name in CHOICES
        ),
        seconds=time.monotonic() - started,
        seed=seed,
        settings=job.settings() | {"window_of_dead": len(job.held_out)},
    )
