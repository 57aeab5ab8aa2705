"""Claim: with a group penalty on its latents, a JEPA's representation serves a linear classifier better.

Paper: Hartman and Varshney 2025, https://arxiv.org/abs/2504.16140: CIFAR-100, a lightweight vision transformer, linear
probes after pre-training without labels.
"""

import time
from typing import Any

import torch

from ..dictionary.sparse_jepa import SparseJepa, group_lasso, train_jepa
from ..measure.linear_probe import linear_probe
from . import CLAIMS
from .base import ClaimResult
from .pictures import small_pictures

NAME = "sparse-jepa-probe"
ARMS: dict[str, dict[str, float]] = {
    "jepa": {"kl": 0.0, "group": 0.0},
    "sparse_jepa": {"kl": 1e-4, "group": 1e-3},
}


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Train JEPA and SparseJEPA on Fashion-MNIST (digits where it is not there), alike but for the loss.

    Latents, means over the patches, are probed by logistic regression on labelled pictures; other pictures are scored.
    It holds if, in every draw, SparseJEPA's latents are probed better than JEPA's and better than those of the network
    before training, without which there is nothing to compare. Probes of the encoder, and the group norm of the latents
    over their l2 norm, are reported beside.

    Args:
        quick: few steps, few pictures and one draw.
        seed: of the first draw; the others follow.
    """
    started = time.monotonic()
    steps, count, num_test, draws = (30, 1_500, 1_000, 1) if quick else (500, 10_000, 5_000, 3)
    learn, held_out = small_pictures(count, num_test)
    side = learn.pixels.shape[-1]
    measured: list[dict[str, Any]] = []
    for draw in range(seed, seed + draws):
        figures: dict[str, Any] = {}
        for arm, weights in ({"untrained": ARMS["jepa"]} | ARMS).items():
            with torch.random.fork_rng([]):
                torch.manual_seed(draw)
                model = SparseJepa(image_size=side, patch_size=side // 4, kl=weights["kl"], group=weights["group"])
            losses = [] if arm == "untrained" else train_jepa(model, learn, steps=steps, seed=draw)
            known, asked = model.embed(learn), model.embed(held_out)
            found = [linear_probe(a, learn.labels, b, held_out.labels).value for a, b in zip(known, asked, strict=True)]
            spread = group_lasso(asked[0], model.num_groups) / asked[0].norm(dim=1).mean()
            figures[arm] = {"latents": found[0], "encoder": found[1], "groups": float(spread)}
            figures[arm] |= {"error": float(losses[-1].error)} if losses else {}
        measured.append(figures)
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"direction": "linear probes are better with the penalty than without"},
        measured={"draws": measured},
        holds=all(
            draw["sparse_jepa"]["latents"] > draw[other]["latents"]
            for draw in measured
            for other in ("jepa", "untrained")
        ),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "data": learn.name,
            "images": len(learn),
            "held_out": len(held_out),
            "steps": steps,
            "batch_size": 128,
            "weights": ARMS,
            "patch_size": side // 4,
            "draws": draws,
        },
    )
