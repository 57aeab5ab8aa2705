"""Claim: layer by layer, CRATE compresses tokens and makes them sparser, trained by labels alone.

Paper: Yu et al. 2023, https://arxiv.org/abs/2306.01129, Section 3.1: CRATE on ImageNet-1K; with the layer both the
coding rate of what attention makes and the share of nonzeros of ISTA's output fall, but for the last layers.
"""

import time
from typing import Any

import torch

from ..dictionary.crate import Crate, layer_terms
from ..measure.images import accuracy
from ..training import train
from . import CLAIMS
from .base import ClaimResult
from .pictures import small_pictures

NAME = "crate-sparsifies"


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Train CRATE to classify Fashion-MNIST (digits where it is not there); measure both terms on held-out pictures.

    It holds if, in every draw, the last block's output has a smaller share of nonzeros than the first one's, and tokens
    have a smaller coding rate in the subspaces of the last block than in those of the first. The same networks before
    training are reported beside, as are accuracies.

    Args:
        quick: fewer pictures, a smaller network and one draw.
        seed: of the first draw; the others follow.
    """
    started = time.monotonic()
    count, depth, width, epochs, draws = (2_000, 3, 48, 2, 1) if quick else (8_000, 6, 64, 5, 3)
    learn, held_out = small_pictures(count, 500 if quick else 1_000)
    side = learn.pixels.shape[-1]
    epochs = max(epochs, epochs * count // (2 * len(learn)))
    measured: list[dict[str, Any]] = []
    for draw in range(seed, seed + draws):
        with torch.random.fork_rng([]):
            torch.manual_seed(draw)
            model = Crate(image_size=side, patch_size=side // 4, width=width, depth=depth)
        figures: dict[str, Any] = {"untrained": layer_terms(model, held_out)}
        train(model, learn, epochs=epochs, learning_rate=0.05, seed=draw, shift=side // 14)
        figures |= {"trained": layer_terms(model, held_out), "accuracy": accuracy(model, held_out).value}
        measured.append(figures)
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"direction": "coding rate and nonzeros fall with the layer, but for the last ones"},
        measured={"draws": measured},
        holds=all(
            draw["trained"][-1][term] < draw["trained"][0][term]
            for draw in measured
            for term in ("nonzeros", "coding_rate")
        ),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "data": learn.name,
            "images": len(learn),
            "held_out": len(held_out),
            "epochs": epochs,
            "width": width,
            "depth": depth,
            "heads": 4,
            "patch_size": side // 4,
            "draws": draws,
        },
    )
