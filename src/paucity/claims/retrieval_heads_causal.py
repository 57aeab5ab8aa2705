"""Claim: masking retrieval heads destroys retrieval, and masking as many other heads does not.

Paper: Wu et al. 2024, https://arxiv.org/abs/2404.15574, abstract and Sec. 4: without its retrieval heads a model
fails to find the needle, without as many random others it still does.

The heads that score above 0.1 are masked, in the order of their scores, one, two, ... and all of them; and of the
others as many at random, several times. Needles for scores and prompts for accuracy have different seeds. Passkeys are
generated; accuracy is exact match. Holds when with some number of heads masking those that retrieve leaves at most half
of the dense accuracy, and masking as many others at least nine tenths of it in the median draw. The paper masks about a
twentieth of the heads; here every head is already that, and a few others together carry what the retrieving ones need,
so that with many of them masked nothing is left either way. Every number is reported.
"""

import random
import statistics
import time
from typing import Any

from ..attention import masked_heads
from ..measure.data import held_out_python
from ..measure.retrieval import retrieval_accuracy
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult
from .retrieval_heads_sparse import NUM_CHARACTERS, THRESHOLD, head_scores

NAME = "retrieval-heads-causal"
LENGTH, SCORE_LENGTHS, NUM_DEPTHS = 1024, (1024,), 5
NUM_PROMPTS, QUICK_PROMPTS = 10, 4
NUM_DRAWS, QUICK_DRAWS = 8, 3


def specific(dense: float, top: float, others: float) -> bool:
    """Whether accuracy is at most half without the top heads, and hardly less without others."""
    return top <= dense / 2 and others >= 0.9 * dense > 0


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Find the heads, and measure passkeys without them and without others.

    Args:
        quick: fewer prompts and draws.
        seed: of needles, prompts and draws.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    model, tokenizer = loaded.model, loaded.need_tokenizer(NAME)
    text = held_out_python()[:NUM_CHARACTERS]
    num_prompts, draws = (QUICK_PROMPTS, QUICK_DRAWS) if quick else (NUM_PROMPTS, NUM_DRAWS)
    scores = head_scores(loaded, text, lengths=SCORE_LENGTHS, num_depths=NUM_DEPTHS, seed=seed)
    order = [divmod(at, scores.shape[1]) for at in scores.flatten().argsort(descending=True, stable=True).tolist()]
    found = order[: int((scores > THRESHOLD).sum())]
    top = found or order[:1]

    def accuracy(heads: list[tuple[int, int]]) -> float:
        with masked_heads(model, heads):
            return retrieval_accuracy(
                *(model, tokenizer),
                task="passkey",
                length=LENGTH,
                filler=text,
                num_prompts=num_prompts,
                seed=seed + 1,
            ).accuracy.value

    dense, rng = accuracy([]), random.Random(seed)
    rows: list[dict[str, Any]] = []
    for count in range(1, len(top) + 1):
        others = [sorted(rng.sample(order[len(top) :], min(count, len(order) - len(top)))) for _ in range(draws)]
        rest = [accuracy(heads) for heads in others]
        rows.append(
            {
                "masked": count,
                "top": accuracy(top[:count]),
                "random_mean": statistics.mean(rest),
                "random_median": statistics.median(rest),
                "random": rest,
            }
        )
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"retrieval heads masked": "failure", "random other heads masked": "not affected"},
        measured={
            "dense": dense,
            "by_count": rows,
            "top": [{"layer": i, "head": j, "score": float(scores[i, j])} for i, j in top],
        },
        holds=bool(found) and any(specific(dense, row["top"], row["random_median"]) for row in rows),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "task": "passkey",
            "length": LENGTH,
            "num_prompts": num_prompts,
            "draws": draws,
            "threshold": THRESHOLD,
            "mode": "generate",
        },
    )
