"""Claim: retrieval heads are few.

Paper: Wu et al. 2024, https://arxiv.org/abs/2404.15574, abstract and Sec. 3: less than 5 % of the heads of every
model score above 0.1.

Every head of the model is scored on passkeys and on one of sixteen numbers asked for by name, at several lengths and at
all depths. Holds when at most 5 % of the heads score above 0.1, and at least one head does. The embedded model has
twenty heads in five layers, two to a KV head, so that a single retrieval head is already 5 % of them: the share says
how many it needs for the task, and is reported as it is, with that of KV heads and the part of all scores that the
retrieving heads have.
"""

import time

from torch import Tensor

from ..attention import needle_prompts, retrieval_scores
from ..measure.data import held_out_python
from ..measure.tokens import context_length
from ..models.load import Loaded, load
from ..models.text_config import text_config
from . import CLAIMS
from .base import ClaimResult

NAME = "retrieval-heads-sparse"
TASKS = ("passkey", "key_value")
LENGTHS, QUICK_LENGTHS = (1024, 2048, 4096), (1024,)
NUM_DEPTHS, QUICK_DEPTHS = 10, 5
THRESHOLD, MOST = 0.1, 0.05
NUM_CHARACTERS = 100_000


def head_scores(loaded: Loaded, text: str, *, lengths: tuple[int, ...], num_depths: int, seed: int) -> Tensor:
    """The retrieval scores ``[layers, H]`` of a model on the tasks of this claim."""
    tokenizer = loaded.need_tokenizer(NAME)
    needles = needle_prompts(
        tokenizer, text[:NUM_CHARACTERS], tasks=TASKS, lengths=lengths, num_depths=num_depths, seed=seed
    )
    return retrieval_scores(loaded.model, needles)


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Score every head.

    Args:
        quick: one length, fewer depths.
        seed: of needles and texts.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    lengths, num_depths = (QUICK_LENGTHS, QUICK_DEPTHS) if quick else (LENGTHS, NUM_DEPTHS)
    scores = head_scores(loaded, held_out_python(), lengths=lengths, num_depths=num_depths, seed=seed)
    config = text_config(loaded.model)
    kv_heads = getattr(config, "num_key_value_heads", None) or scores.shape[1]
    above = scores > THRESHOLD
    by_kv_head = above.view(len(scores), kv_heads, -1).any(-1)
    share, total = float(above.float().mean()), float(scores.sum())
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"share_above_0.1": "less than 5 %"},
        measured={
            "share_above_0.1": share,
            "heads_above_0.1": int(above.sum()),
            "heads": above.numel(),
            "kv_heads_with_one": int(by_kv_head.sum()),
            "kv_heads": by_kv_head.numel(),
            "share_above_0": float((scores > 0).float().mean()),
            "part_of_all_scores": float(scores[above].sum()) / total if total else None,
            "scores": [[round(score, 4) for score in row] for row in scores.tolist()],
        },
        holds=bool(above.any()) and share <= MOST,
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "context": context_length(loaded.model),
            "tasks": list(TASKS),
            "lengths": list(lengths),
            "num_depths": num_depths,
            "threshold": THRESHOLD,
            "most": MOST,
        },
    )
