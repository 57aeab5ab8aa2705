"""Claim: following a thread through a text is harder than finding a needle, and harder the longer the thread.

Paper: Roberts et al. 2024 (Needle Threading), https://arxiv.org/abs/2411.05000, Sec. 4 and Fig. 5: a needle is found by
nearly all models, while accuracy on the value at the end of a thread falls with its length. Threads of one step are
needles; all prompts have equally many lines. A model this small follows no thread of numbers that it was not trained
on, so the end of a chain of variables, which it was, is measured too: in how many prompts each step of a chain of
three is named. Both are measured dense, and with each decoded token reading one in twenty of the cached keys, those
with the largest attention.

Holds when, dense and sparse, the needle is found more often than any thread's end, no thread more often than a shorter
one, and the last step of the chain less often than the first. Differences: the paper has UUIDs as keys, up to 25 steps,
630k tokens and models of 17 families.
"""

import random
import time
from collections.abc import Sequence
from itertools import pairwise

from ..attention import apply
from ..attention.decode import OracleTopK
from ..measure.data import held_out_python
from ..measure.prompts import Fact, threading, variable_tracking
from ..measure.retrieval import answer_score, build_prompt, generate_answer
from ..measure.tokens import encode, evaluating, line_end_ids
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult

NAME = "threads-harder-than-needles"
STEPS, LINES = (1, 2, 3, 4), 12
HOPS = 3
LENGTHS, QUICK_LENGTHS = (1024, 2048), (1024,)
NUM_PROMPTS, QUICK_PROMPTS = 16, 8
SHARE = 0.05
NUM_CHARACTERS = 100_000


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Ask for needles, the ends of threads, and every step of a chain of variables, dense and sparse.

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
                chain = _steps_found(loaded, length, num_prompts, seed)
                density = list(applied.density().values()) if applied else [1.0]
            finally:
                if applied is not None:
                    applied.remove()
            needle, *threads = ends.values()
            falls = all(a >= b for a, b in pairwise(threads))
            holds &= needle > max(threads) and falls and chain[0] > chain[-1]
            rows.append(
                {
                    "length": length,
                    "keys_read": sum(density) / len(density) if density else None,
                    "end_found_by_steps": {str(steps): found for steps, found in ends.items()},
                    "variables_found_by_step": chain,
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
            "hops": HOPS,
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


def _steps_found(loaded: Loaded, length: int, num_prompts: int, seed: int) -> list[float]:
    """Share of the prompts in which each variable of a chain is named, from that next to the number on."""
    rng = random.Random(seed)
    facts = [variable_tracking(rng, num_hops=HOPS, num_chains=LINES // (HOPS + 1)) for _ in range(num_prompts)]
    outputs = _answers(loaded, facts, length, rng)
    named = [[answer in out for answer in fact.answers] for out, fact in zip(outputs, facts, strict=True)]
    return [sum(column) / num_prompts for column in zip(*named, strict=True)]


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
