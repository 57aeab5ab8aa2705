"""Claim: after a prompt was cut once, SnapKV has kept more of what is asked for than a recent window of equal size.

Papers: Li et al. 2024 (SnapKV), https://arxiv.org/abs/2404.14469, Sec. 5 (needle in a haystack at a small part of the
cache), against the sinks and window of StreamingLLM, https://arxiv.org/abs/2309.17453. Both keep the same number of
entries in every layer and head, an eighth and a quarter of the prompt, and drop nothing while they answer.

Holds when, at every budget, the mean accuracy over the tasks is higher with SnapKV, the question standing at the end of
the prompt as in the paper, and the method's defaults in force. Besides, with no part in the verdict: the same with the
question in a turn of its own, after the prompt was cut without knowing it; the bits of a text's continuation, where the
nearest tokens matter most; and both with a kernel as wide as the facts, each of which is several tokens here.
Differences: a small model and prompts within its context; the answer is read in one pass, each token of it given those
before.
"""

import statistics
import time

from ..attention import EvictionPolicy, SnapKV, StreamingLLM, apply
from ..measure.after_prompt import Case, after_prompt, continuation_cases, retrieval_cases
from ..measure.data import held_out_python
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult

NAME = "snapkv-beats-window"
TASKS = ("passkey", "key_value")
LENGTH, QUICK_LENGTH = 2048, 1024
DENSITIES, QUICK_DENSITIES = (0.125, 0.25), (0.25,)
NUM_PROMPTS, QUICK_PROMPTS = 12, 6
NUM_TEXTS, QUICK_TEXTS, CONTINUED = 6, 2, 128
NUM_CHARACTERS = 100_000
WIDE_KERNEL = 21


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Measure dense, SnapKV and the window on the same prompts and texts.

    Args:
        quick: one budget, fewer and shorter prompts.
        seed: of the prompts.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    tokenizer, text = loaded.need_tokenizer(NAME), held_out_python()[:NUM_CHARACTERS]
    length, num_prompts = (QUICK_LENGTH, QUICK_PROMPTS) if quick else (LENGTH, NUM_PROMPTS)
    num_texts = QUICK_TEXTS if quick else NUM_TEXTS
    asked: dict[str, list[Case]] = {}
    for task in TASKS:
        for when, later in (("in the prompt", False), ("in a later turn", True)):
            asked[f"{task}, asked {when}"] = retrieval_cases(
                tokenizer,
                task=task,
                length=length,
                filler=text,
                num_prompts=num_prompts,
                seed=seed,
                ask_later=later,
            )
    texts = continuation_cases(tokenizer, text, length=length - CONTINUED, num_tokens=CONTINUED, num_texts=num_texts)

    def measure(policy: EvictionPolicy | None) -> dict[str, float]:
        applied = None if policy is None else apply(loaded.model, policy)
        try:
            row = {
                name: statistics.mean(outcome.right for outcome in after_prompt(loaded.model, cases))
                for name, cases in asked.items()
            }
            bits = sum(outcome.bits for outcome in after_prompt(loaded.model, texts))
            for when in ("in the prompt", "in a later turn"):
                row[f"mean, asked {when}"] = statistics.mean(row[f"{task}, asked {when}"] for task in TASKS)
            row["bits per byte of the continuation"] = bits / sum(case.num_bytes for case in texts)
            return row
        finally:
            if applied is not None:
                applied.remove()

    rows, dense = [], measure(None)
    for density in QUICK_DENSITIES if quick else DENSITIES:
        policies = {
            "snapkv": SnapKV(density=density),
            "snapkv, wide kernel": SnapKV(density=density, kernel_size=WIDE_KERNEL),
            "window": StreamingLLM(density=density, every=0),
        }
        rows.append({"density": density} | {name: measure(policy) for name, policy in policies.items()})
    mean = "mean, asked in the prompt"
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"needle in a haystack": "found with a small part of the cache, where a window loses it"},
        measured={"dense": dense, "by_density": rows},
        holds=all(row["snapkv"][mean] > row["window"][mean] for row in rows),  # type: ignore[index]
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "length": length,
            "num_prompts": num_prompts,
            "num_texts": num_texts,
            "continued_tokens": CONTINUED,
            "wide_kernel": WIDE_KERNEL,
            "text": f"the first {NUM_CHARACTERS} characters of held_out_python",
        },
    )
