"""Claim: chosen by the gradient of the loss too, codes of equal sparsity change a model's predictions less.

Paper: Olmo et al. 2024, https://arxiv.org/abs/2411.10397, on GPT-2 small, layer 7, and other sizes.
"""

import time
from dataclasses import asdict, replace

from ..dictionary.gradient_topk import GradientTopK
from ..dictionary.sae import Rule
from ..dictionary.topk import TopK
from . import CLAIMS, dictionaries
from .base import ClaimResult

NAME = "gsae-more-faithful"
BETAS = (0.25, 1.0)
TRIED = 3
"""Draws on which the smaller beta was chosen; others are judged."""


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Train TopK and gradient SAEs on the same batches, and let the model go on with what each reconstructs.

    Gradients are known in training alone: all dictionaries encode the held-out text as TopK does. The paper's beta is
    not known to us: of 1, first taken, and 0.25, the latter did better in the draws 0 to 2, and others than these are
    run. It holds if, in every draw, the gradient SAE with beta 0.25 raises the loss by less than TopK; 1 is reported.

    Args:
        quick: less data and one draw.
        seed: of the first draw; the others follow.
    """
    started = time.monotonic()
    sizes = replace(dictionaries.FULL, text_tokens=98_304, num_tokens=294_912, spliced_tokens=16_384)
    job = dictionaries.Embedded(NAME, dictionaries.QUICK if quick else sizes, seed=TRIED + seed, gradients=True)
    draws = []
    for draw in job.seeds:
        k = job.sizes.k
        rules: dict[str, Rule] = {"topk": TopK(k)} | {f"beta_{beta:g}": GradientTopK(k, beta=beta) for beta in BETAS}
        found = zip(rules, job.train(list(rules.values()), draw), strict=True)
        draws.append({name: asdict(job.kept(one, spliced=True)) for name, one in found})
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"direction": "lower downstream loss than TopK at equal k, at about equal error, fewer dead"},
        measured={"draws": draws, "nats_of_the_model": job.whole.nats_per_token.value},
        holds=all(each["beta_0.25"]["nats"] < each["topk"]["nats"] for each in draws),
        seconds=time.monotonic() - started,
        seed=seed,
        settings=job.settings() | {"betas": list(BETAS)},
    )
