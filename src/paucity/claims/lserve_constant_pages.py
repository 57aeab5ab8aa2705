"""Claim: a constant number of pages keeps long-context accuracy, however long the context.

Paper: Yang et al. 2025 (LServe), https://arxiv.org/abs/2502.14866, abstract and Sec. 3.4: 4096 keys, in pages of 64,
suffice irrespective of context length.

Steps after a prompt that is read densely, with the pages of 64 keys and their four parts of the paper, reselected every
four tokens, and a budget of 512 keys, as contexts are shorter here. Passkeys and one of sixteen numbers by name are
generated. The same budget with streaming in half of the KV heads (found on Python
source) is measured beside it. Holds when at every length the mean accuracy is at most 0.05 below the dense one, while
the share of the cache that is read falls as the context grows. ``by_length`` has the figures.
"""

import statistics
import time
from itertools import pairwise

from ..attention import LServe, PagedSelection
from ..measure.data import held_out_python, read_text
from ..models.calibration import calibration_batches
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult
from .decoded import decoded_accuracy

NAME = "lserve-constant-pages"
TASKS = ("passkey", "key_value")
LENGTHS, QUICK_LENGTHS = (2048, 4096, 8192), (1024, 2048)
NUM_KEYS = 512
NUM_PROMPTS, QUICK_PROMPTS = 10, 3
SAMPLES, CALIBRATION_LENGTH = 4, 1024
NUM_CHARACTERS = 100_000
MOST_LOST = 0.05


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Measure dense and paged steps on the same prompts, at growing lengths.

    Args:
        quick: shorter and fewer prompts.
        seed: of calibration and prompts.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    model, tokenizer, text = loaded.model, loaded.need_tokenizer(NAME), held_out_python()[:NUM_CHARACTERS]
    lengths, num_prompts = (QUICK_LENGTHS, QUICK_PROMPTS) if quick else (LENGTHS, NUM_PROMPTS)
    calibration = calibration_batches(
        *(tokenizer, read_text("python", role="calibration")),
        num_samples=SAMPLES,
        length=CALIBRATION_LENGTH,
        seed=seed,
    )
    policies = {
        "dense": None,
        "pages": PagedSelection(num_keys=NUM_KEYS, min_length=0),
        "pages_and_streaming": LServe(num_keys=NUM_KEYS, min_length=0).fit(model, calibration),
    }
    rows, kept, shares = [], True, []
    for length in lengths:
        row: dict[str, object] = {"length": length}
        mean = {}
        for name, policy in policies.items():
            accuracy, density = decoded_accuracy(
                *(loaded, policy, TASKS, text), length=length, num_prompts=num_prompts, seed=seed
            )
            mean[name] = statistics.mean(accuracy.values())
            row[name] = accuracy | {"density": density}
            if name == "pages":
                shares.append(density)
        kept &= mean["pages"] >= mean["dense"] - MOST_LOST
        rows.append(row)
    streaming = policies["pages_and_streaming"]
    assert streaming is not None
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"keys": 4096, "accuracy": "maintained irrespective of context length"},
        measured={"by_length": rows, "streaming": streaming.streaming},
        holds=kept and all(after < before for before, after in pairwise(shares)),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "tasks": list(TASKS),
            "num_keys": NUM_KEYS,
            "page_size": PagedSelection().page_size,
            "num_chunks": PagedSelection().num_chunks,
            "reselect_every": PagedSelection().reselect_every,
            "num_prompts": num_prompts,
            "mode": "generate",
            "most_lost": MOST_LOST,
        },
    )
