"""Claim: following a thread through a text is harder than finding a needle, and no easier the longer the thread.

Paper: Roberts et al. 2024 (Needle Threading), https://arxiv.org/abs/2411.05000, Sec. 4 and Fig. 5: a needle is found by
nearly all models, while accuracy on the value at the end of a thread falls with its length. Threads of one step are
needles, and all prompts have equally many lines. Measured dense, and with each decoded token reading one in twenty of
the cached keys, those with the largest attention.

Holds when, dense and sparse, the needle is found more often than any thread's end, and no thread's more often than a
shorter one's. The embedded model finds needles and follows no thread of two steps or more, so how fast accuracy falls
with the length cannot be seen on it. Differences: the paper has UUIDs as keys, up to 25 steps
and 630k tokens, and 17 models.
"""

import random
import time
from collections.abc import Sequence
from itertools import pairwise

from ..attention import apply
from ..attention.decode import OracleTopK
from ..measure.data import held_out_python
from ..measure.prompts import Fact, threading
from ..measure.retrieval import answer_score, build_prompt, generate_answer
from ..measure.tokens import encode, evaluating, line_end_ids
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult

NAME = "threads-harder-than-needles"
STEPS, LINES = (1, 2, 3, 4), 12
LENGTHS, QUICK_LENGTHS = (1024, 2048), (1024,)
NUM_PROMPTS, QUICK_PROMPTS = 16, 8
SHARE = 0.05
NUM_CHARACTERS = 100_000


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Ask for needles and for the ends of threads, dense and sparse.

    Args:
        quick: one length, fewer prompts.
        seed: of the prompts.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    num_prompts, lengths = (QUICK_PROMPTS, QUICK_LENGTHS) if quick else (NUM_PROMPTS, LENGTHS)
    rows, holds = [], True
    for length in lengths:
        for share in (None, SHARE):
            policy = None if share is None else OracleTopK(num_keys=max(1, round(share * length)), min_length=0)
            applied = None if policy is None else apply(loaded.model, policy)
            try:
                ends = {steps: _end_found(loaded, steps, length, num_prompts, seed) for steps in STEPS}
                density = list(applied.density().values()) if applied else [1.0]
            finally:
                if applied is not None:
                    applied.remove()
            needle, *threads = ends.values()
            falls = all(a >= b for a, b in pairwise(threads))
            holds &= needle > max(threads) and falls
            rows.append(
                {
                    "length": length,
                    "keys_read": sum(density) / len(density) if density else None,
                    "end_found_by_steps": {str(steps): found for steps, found in ends.items()},
                }
            )
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"needle": "near 100 % for most models", "threads": "falls with the thread's length"},
        measured={"by_setting": rows},
        holds=holds,
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "num_prompts": num_prompts,
            "lines": LINES,
            "mode": "generate",
            "sparse": f"oracle_topk, {SHARE:.0%} of the keys in decoding",
            "text": f"the first {NUM_CHARACTERS} characters of held_out_python",
        },
    )


def _end_found(loaded: Loaded, steps: int, length: int, num_prompts: int, seed: int) -> float:
    """Share of the prompts in which the value at the end of a thread is given."""
    rng = random.Random(seed)
    facts = [threading(rng, num_steps=steps, num_threads=LINES // steps) for _ in range(num_prompts)]
    outputs = _answers(loaded, facts, length, rng)
    return sum(answer_score(out, fact.answers) for out, fact in zip(outputs, facts, strict=True)) / num_prompts


def _answers(loaded: Loaded, facts: Sequence[Fact], length: int, rng: random.Random) -> list[str]:
    """What the model says after each question."""
    tokenizer = loaded.need_tokenizer(NAME)
    filler = encode(tokenizer, held_out_python()[:NUM_CHARACTERS])
    ends = line_end_ids(tokenizer, filler)
    with evaluating(loaded.model):
        return [
            generate_answer(loaded.model, tokenizer, build_prompt(tokenizer, fact, filler, length, rng, line_ends=ends))
            for fact in facts
        ]
