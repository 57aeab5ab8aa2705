"""Claim: at equal sparsity WINA keeps more quality than TEAL.

Paper: Chen et al. 2025, https://arxiv.org/abs/2505.19427, section 4. The claim is about the ranking, so that both get
the same selector, the top-k of each token, and exactly the same sparsity. Calibrated thresholds, which TEAL's own paper
uses and which give busy tokens more, are measured beside it for both (not in the quick run). Every difference comes
with its 95 % interval over windows: `holds` is the direction of the mean alone. Differences: every site has the same
sparsity, where the paper allocates greedily; the weights are not made column-orthogonal; quality is perplexity, where
the paper has the mean accuracy of tasks.
"""

import random
import statistics
import time
from typing import Any

from ..activations.apply import apply_step, options_for
from ..measure.data import held_out_python, python_documents
from ..measure.quality import Quality, bits_per_byte, relative_change
from ..models.calibration import calibration_batches
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult

NAME = "wina-beats-teal"
SPARSITIES = (0.25, 0.4, 0.5, 0.65)
QUICK_SPARSITIES = (0.4, 0.65)
NUM_DOCUMENTS, NUM_SAMPLES = 60, 32


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Measure both at several sparsities on text never trained on; the claim is about the mean over sparsities.

    Args:
        quick: two sparsities, top-k only, and a shorter text.
        seed: of the calibration text.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    tokenizer = loaded.need_tokenizer(NAME)
    sparsities, max_tokens = (QUICK_SPARSITIES, 16384) if quick else (SPARSITIES, 24576)
    selectors = ("topk",) if quick else ("topk", "threshold")
    documents = random.Random(seed).sample(python_documents(include_tests=False), NUM_DOCUMENTS)
    text, held_out = "\n".join(documents), held_out_python()
    batches = calibration_batches(tokenizer, text, num_samples=NUM_SAMPLES, length=512, seed=seed)
    sizes = {name: parameter.numel() for name, parameter in loaded.model.named_parameters()}

    def measure() -> Quality:
        return bits_per_byte(loaded.model, tokenizer, held_out, length=1024, stride=512, max_tokens=max_tokens)

    def sparse(method: str, selector: str, sparsity: float) -> tuple[Quality, float]:
        options = options_for(method)(sparsity=sparsity, allocation="uniform", selector=selector)
        applied = apply_step(loaded, method, options, batches)
        try:
            quality, density = measure(), applied.density()
        finally:
            applied.remove()
        total = sum(sizes[name] for name in density)
        return quality, 1 - sum(kept * sizes[name] for name, kept in density.items()) / total

    dense = measure()
    rows: list[dict[str, Any]] = []
    for selector in selectors:
        for sparsity in sparsities:
            (teal, teal_reached), (wina, wina_reached) = (sparse(m, selector, sparsity) for m in ("teal", "wina"))
            change = relative_change(teal, wina, seed=seed)
            rows.append(
                {
                    "selector": selector,
                    "teal": {"sparsity": teal_reached, "perplexity": teal.perplexity.value},
                    "wina": {"sparsity": wina_reached, "perplexity": wina.perplexity.value},
                    "change_in_nats": {"mean": change.value, "low": change.low, "high": change.high},
                    "gain_in_nats_per_token": teal.nats_per_token.value - wina.nats_per_token.value,
                }
            )
    gains = {s: statistics.mean(r["gain_in_nats_per_token"] for r in rows if r["selector"] == s) for s in selectors}
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"gain in mean accuracy at equal sparsity, up to, percentage points": 2.94},
        measured={
            "dense_perplexity": dense.perplexity.value,
            "mean_gain_in_nats_per_token": gains,
            "by_sparsity": rows,
        },
        holds=gains["topk"] > 0,
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "sparsities": list(sparsities),
            "allocation": "uniform",
            "calibration": {"text": f"{NUM_DOCUMENTS} modules of python", "num_samples": NUM_SAMPLES, "length": 512},
            "text": "held_out_python",
            "max_tokens": max_tokens,
            "length": 1024,
            "stride": 512,
        },
    )
