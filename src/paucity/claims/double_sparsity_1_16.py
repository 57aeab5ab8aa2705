"""Claim: a sixteenth of the channels finds a sixteenth of the tokens that keeps a model's quality.

Paper: Yang et al. 2024 (Double Sparsity), https://arxiv.org/abs/2408.07092, abstract: perplexity, retrieval by key and
long-context benchmarks of Llama 2 and Mixtral change little at 1/16 of tokens and channels.

Steps after a prompt that is read densely: passkeys and one of sixteen numbers by name are generated, and text is
predicted token by token. The first two layers are dense, labels have four bits, channels are found on Python source.
Heads of the paper's models have 128 channels, so that a sixteenth is eight; those of the embedded one have 64, so that
it is four. Both and an eighth and a fourth are measured, with all of the channels as what no selection of labels can
exceed. Holds when, at a sixteenth of both, mean accuracy is at most 0.05 below the dense one and bits per byte at most
2 % above.
"""

import statistics
import time
from typing import Any

from ..attention import DoubleSparsity, apply
from ..measure.continuation import continuation
from ..measure.data import held_out_python, read_text
from ..measure.quality import Quality, relative_change
from ..models.calibration import calibration_batches
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult
from .decoded import decoded_accuracy

NAME = "double-sparsity-1-16"
TASKS = ("passkey", "key_value")
DENSITY = 1 / 16
SHARES, QUICK_SHARES = (1 / 16, 1 / 8, 1 / 4, 1.0), (1 / 16, 1 / 4)
LENGTH, QUICK_LENGTH = 2048, 1024
NUM_PROMPTS, QUICK_PROMPTS = 12, 4
TEXT_PROMPTS, QUICK_TEXT_PROMPTS, TEXT_TOKENS = 4, 2, 32
SAMPLES, CALIBRATION_LENGTH = 4, 1024
NUM_CHARACTERS = 100_000
MOST_LOST, MOST_BITS = 0.05, 0.02


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Calibrate, and measure dense and sparse steps on the same prompts.

    Args:
        quick: shorter, fewer prompts, fewer shares of channels.
        seed: of calibration and prompts.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    model, tokenizer, text = loaded.model, loaded.need_tokenizer(NAME), held_out_python()[:NUM_CHARACTERS]
    length, num_prompts = (QUICK_LENGTH, QUICK_PROMPTS) if quick else (LENGTH, NUM_PROMPTS)
    calibration = calibration_batches(
        *(tokenizer, read_text("python", role="calibration")),
        num_samples=SAMPLES,
        length=CALIBRATION_LENGTH,
        seed=seed,
    )

    def bits() -> Quality:
        prompts = QUICK_TEXT_PROMPTS if quick else TEXT_PROMPTS
        return continuation(
            *(model, tokenizer, text),
            length=length,
            num_tokens=TEXT_TOKENS,
            num_windows=prompts,
            mode="generate",
            seed=seed,
        )

    sizes: dict[str, Any] = {"length": length, "num_prompts": num_prompts, "seed": seed}
    dense, dense_bits = decoded_accuracy(loaded, None, TASKS, text, **sizes)[0], bits()
    assert dense_bits.bits_per_byte is not None  # a text was given
    rows, good = [], []
    for share in QUICK_SHARES if quick else SHARES:
        policy = DoubleSparsity(channel_share=share, density=DENSITY, min_length=0).fit(model, calibration)
        accuracy, density = decoded_accuracy(loaded, policy, TASKS, text, **sizes)
        applied = apply(model, policy)
        try:
            change = relative_change(dense_bits, bits(), seed=seed)
        finally:
            applied.remove()
        lost = statistics.mean(dense.values()) - statistics.mean(accuracy.values())
        good.append(lost <= MOST_LOST and change.value <= MOST_BITS)
        rows.append(
            {
                "channel_share": share,
                "channels": len(policy.channels[-1][0]),
                **accuracy,
                "accuracy_lost": lost,
                "change_in_bits": {"mean": change.value, "low": change.low, "high": change.high},
                "density": density,
            }
        )
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"density": 1 / 16, "channel_share": 1 / 16, "quality": "minimal impact on accuracy"},
        measured={"dense": dense, "dense_bits_per_byte": dense_bits.bits_per_byte.value, "by_channels": rows},
        holds=good[0],
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "tasks": list(TASKS),
            "length": length,
            "num_prompts": num_prompts,
            "mode": "generate",
            "density": "1/16 of the tokens in all layers but the first two",
            "calibration": f"{SAMPLES} texts of {CALIBRATION_LENGTH} tokens of Python source",
            "most_lost": MOST_LOST,
            "most_bits": MOST_BITS,
        },
    )
