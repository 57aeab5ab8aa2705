"""A model pruned again and again, and how well it then predicts text that it was never trained on."""

import random
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..measure.data import held_out_python, python_documents
from ..measure.quality import Quality, bits_per_byte
from ..models.calibration import calibration_batches
from ..models.load import Loaded, load
from ..weights.apply import apply_step, options_for

NUM_DOCUMENTS = 60
LENGTH = 512


class Pruned:
    """One model with calibration text and a text to measure on.

    Args:
        name: of the claim, for errors.
        quick: less calibration and a shorter text.
        seed: of the first draw of calibration text; the others follow.
        draws: how many draws there are, in full; one when quick.
        loaded: the model, the embedded one if not given.
    """

    def __init__(self, name: str, *, quick: bool, seed: int, draws: int, loaded: Loaded | None = None) -> None:
        self.loaded = loaded or load("embedded")
        self.tokenizer = self.loaded.need_tokenizer(name)
        self.seeds = list(range(seed, seed + (1 if quick else draws)))
        self.samples, self.max_tokens = (16, 8192) if quick else (64, 16384)
        documents = random.Random(seed).sample(python_documents(include_tests=False), NUM_DOCUMENTS)
        self.text, self.held_out = "\n".join(documents), held_out_python()

    def batches(self, draw: int) -> list[Tensor]:
        """The windows of calibration of a draw."""
        return calibration_batches(self.tokenizer, self.text, num_samples=self.samples, length=LENGTH, seed=draw)

    def measure(self) -> Quality:
        """The model as it is."""
        return bits_per_byte(
            self.loaded.model, self.tokenizer, self.held_out, length=1024, stride=512, max_tokens=self.max_tokens
        )

    def quality(self, method: str, draw: int, options: Mapping[str, Any]) -> Quality:
        """The model pruned by a method with these options, calibrated with a draw, and whole again afterwards."""
        applied = apply_step(self.loaded, method, options_for(method)(**options), self.batches(draw))
        try:
            return self.measure()
        finally:
            applied.remove()

    def settings(self) -> dict[str, Any]:
        """What the claim has to say of its model and texts."""
        return {
            "model": self.loaded.source,
            "calibration": {
                "text": f"{NUM_DOCUMENTS} modules of python",
                "num_samples": self.samples,
                "length": LENGTH,
                "seeds": self.seeds,
            },
            "text": "held_out_python",
            "max_tokens": self.max_tokens,
            "length": 1024,
            "stride": 512,
        }


def perplexities(found: list[Quality]) -> list[float]:
    """Of each draw."""
    return [quality.perplexity.value for quality in found]
