"""Claim: one-shot magnitude pruning costs little up to a point, and much beyond it; so too with N:M patterns.

Paper: Jaiswal et al. 2023, https://arxiv.org/abs/2306.03805, sections 3 and 4 (Figures 2 to 4).
"""

import time
from collections.abc import Callable
from typing import Any

from ..measure.data import gutenberg_books, held_out_python, wiki_text
from ..models.load import Loaded, load
from ..weights.essential import Curve, essential_sparsity, text_measure
from . import CLAIMS
from .base import ClaimResult

NAME = "essential-sparsity-knee"
SHARP = 5.0
"""The fall is to be so many times faster behind the knee, and a broken line is to fit better than a smooth curve."""
M = 8
CONTROL = (0.05, 0.1, 0.15, 0.2)
SKIPPED = 20_000
"""Characters of a book that are its title, licence and contents."""


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Draw the curve of magnitude on several texts, unstructured and N:M, and the start of the random one.

    Args:
        quick: one text, fewer sparsities.
        seed: of the random order.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    texts, absent = _texts(quick)
    tokens = 1024 if quick else 3072
    grid = tuple(step / 10 for step in range(1, 10)) if quick else None
    curves = {}
    for name, text in texts.items():
        measure, chance = text_measure(loaded, text, max_tokens=tokens, length=512, stride=512)
        curves[name] = {
            "unstructured": essential_sparsity(loaded.model, measure, chance=chance, sparsities=grid),
            f"n:{M}": essential_sparsity(loaded.model, measure, chance=chance, m=M),
            "random": essential_sparsity(
                loaded.model, measure, chance=chance, sparsities=CONTROL, order="random", seed=seed
            ),
        }
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"essential sparsity of BERT, OPT, ViT and DINO": "30 % to 50 %, where at most 1 % is lost"},
        measured={name: {kind: _summary(curve) for kind, curve in found.items()} for name, found in curves.items()},
        holds=all(_holds(found) for found in curves.values()),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "num_tokens": tokens,
            "length": 512,
            "knee": "broken line of least squares over the points down to the first that keeps half",
            "sharp": SHARP,
            "tolerated_drop": 0.01,
            "texts_left_out": absent,
        },
    )


def _texts(quick: bool) -> tuple[dict[str, str], list[str]]:
    """Texts by name, and those that this machine does not have."""
    python = held_out_python()
    texts, absent = {"python": python[: len(python) // 2]}, list[str]()
    if quick:
        return texts, absent
    texts["python, second half"] = python[len(python) // 2 :]
    readers: dict[str, Callable[[], str]] = {"book": lambda: gutenberg_books()[0][SKIPPED:], "wikitext-2": wiki_text}
    for name, read in readers.items():
        try:
            texts[name] = read()
        except FileNotFoundError as error:
            absent.append(f"{name}: {error}")
    return texts, absent


def _holds(found: dict[str, Curve]) -> bool:
    knees = [found[kind].knee for kind in ("unstructured", f"n:{M}")]
    sharp = all(knee is not None and knee.ratio >= SHARP and knee.is_sharp for knee in knees)
    return sharp and found["unstructured"].tolerated > found["random"].tolerated


def _summary(curve: Curve) -> dict[str, Any]:
    row = curve.to_json()
    kept = {f"{point.sparsity:.3f}": round(point.kept, 4) for point in curve.points}
    dense = curve.points[0].quality
    return {"dense_bits_per_byte": dense, "knee": row["knee"], "tolerated_sparsity": curve.tolerated, "kept": kept}
