"""Claim: about half of an autoencoder's error, and nearly all of its norm, is linear in the activation.

Paper: Engels et al. 2024, https://arxiv.org/abs/2410.14670, on Gemma 2 and Gemma Scope, and Llama 3.1.
"""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..dictionary.dark_matter import DarkMatter, dark_matter
from ..dictionary.sae import SparseAutoencoder
from ..dictionary.topk import TopK
from ..measure.quality import perplexity
from ..measure.stats import mean_interval
from ..models.substitute import substituted
from . import CLAIMS, dictionaries
from .base import ClaimResult

NAME = "dark-matter-linear"
LEAST_R2, LEAST_NORM_R2 = 0.4, 0.9
"""'About half' of the error, and 'over 90 %' of its norm."""
HELD_OUT_TOKENS = 65_536


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Train TopK with two k, fit their errors on half of the tokens of another text, and test on the other half.

    Tokens are halved at random, as in the official code: no dictionary has seen them, and both halves are of one kind.
    It holds if in every draw, for each k, R^2 of the error, a mean over dimensions as in the paper, is at least
    ``LEAST_R2`` and of its squared norm ``LEAST_NORM_R2``. R^2 of all dimensions together is reported, as is by how
    much the loss rises where the model goes on with either part of the error left out of the activation.

    Args:
        quick: less data and one draw.
        seed: of the first draw; the others follow.
    """
    started = time.monotonic()
    full = replace(dictionaries.FULL, held_out_tokens=HELD_OUT_TOKENS, num_tokens=262_144, seeds=2)
    sizes = replace(dictionaries.QUICK, held_out_tokens=2 * dictionaries.QUICK.held_out_tokens) if quick else full
    job = dictionaries.Embedded(NAME, sizes, seed=seed)
    widths = (sizes.k, 2 * sizes.k)
    draws: list[dict[str, Any]] = []
    for draw in job.seeds:
        trained = job.train([TopK(k) for k in widths], draw)
        draws.append({f"k_{k}": _figures(job, sae, draw) for k, sae in zip(widths, trained, strict=True)})
    every = [figures for draw in draws for figures in draw.values()]
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"mean_r2": "about 0.5", "norm_r2": "over 0.9"},
        measured={
            "draws": draws,
            "mean_r2": mean_interval([each["mean_r2"] for each in every], seed=seed).value,
            "norm_r2": mean_interval([each["norm_r2"] for each in every], seed=seed).value,
            "nats_of_the_model": job.whole.nats_per_token.value,
        },
        holds=all(each["mean_r2"] >= LEAST_R2 and each["norm_r2"] >= LEAST_NORM_R2 for each in every),
        seconds=time.monotonic() - started,
        seed=seed,
        settings=job.settings() | {"ks": list(widths), "least_r2": LEAST_R2, "least_norm_r2": LEAST_NORM_R2},
    )


def _figures(job: dictionaries.Embedded, sae: SparseAutoencoder, draw: int) -> dict[str, Any]:
    order = torch.randperm(len(job.held_out), generator=torch.Generator().manual_seed(draw))
    found = dark_matter(sae, *(job.held_out[half] for half in order.chunk(2)))
    nats = job.whole.nats_per_token.value
    costs = {name: _nats(job, sae, found, name) - nats for name in ("all", "linear", "nonlinear")}
    names = ("fvu", "mean_r2", "r2", "norm_r2", "linear", "nonlinear", "num_tokens")
    return {name: getattr(found, name) for name in names} | {"nats_without": costs}


def _nats(job: dictionaries.Embedded, sae: SparseAutoencoder, found: DarkMatter, part: str) -> float:
    """The loss where the model goes on without a part of the error."""

    def change(x: Tensor) -> Tensor:
        linear = found.linear_error(x)
        if part == "linear":
            return x - linear
        reconstruction: Tensor = sae(x)
        return reconstruction if part == "all" else reconstruction + linear

    with substituted(job.loaded.model, job.hook, change):
        ids = job.ids[: job.sizes.spliced_tokens]
        return perplexity(
            job.loaded.model, ids, length=dictionaries.LENGTH, stride=dictionaries.LENGTH
        ).nats_per_token.value
