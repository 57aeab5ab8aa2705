"""Claim: at equal sparsity WINA keeps more quality than TEAL.

Paper: Chen et al. 2025, https://arxiv.org/abs/2505.19427, section 4. Differences: every site has the same sparsity,
where the paper allocates greedily; the weights are not made column-orthogonal; TEAL has its thresholds, where WINA's
authors run it with a top-k of each token, and WINA gets the sparsity that these reach on the text measured; quality
is perplexity, where the paper has the mean accuracy of tasks.
"""

import math
import random
import time

from ..activations.apply import apply_step, options_for
from ..measure.data import held_out_python, python_documents
from ..measure.quality import bits_per_byte
from ..models.calibration import calibration_batches
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult

NAME = "wina-beats-teal"
SPARSITIES = (0.25, 0.4, 0.5, 0.65)
NUM_DOCUMENTS = 60


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Measure both at several sparsities on text never trained on; the claim is about the mean over sparsities.

    Args:
        quick: less calibration and a shorter text.
        seed: of the calibration text.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    tokenizer = loaded.need_tokenizer(NAME)
    samples, max_tokens = (8, 6144) if quick else (32, 24576)
    documents = random.Random(seed).sample(python_documents(include_tests=False), NUM_DOCUMENTS)
    text, held_out = "\n".join(documents), held_out_python()
    batches = calibration_batches(tokenizer, text, num_samples=samples, length=512, seed=seed)
    sizes = {name: parameter.numel() for name, parameter in loaded.model.named_parameters()}

    def measure() -> float:
        quality = bits_per_byte(loaded.model, tokenizer, held_out, length=1024, stride=512, max_tokens=max_tokens)
        return quality.nats_per_token.value

    def sparse(method: str, sparsity: float) -> tuple[float, float]:
        options = options_for(method)(sparsity=sparsity, allocation="uniform")
        applied = apply_step(loaded, method, options, batches)
        try:
            nats, density = measure(), applied.density()
        finally:
            applied.remove()
        total = sum(sizes[name] for name in density)
        return nats, 1 - sum(kept * sizes[name] for name, kept in density.items()) / total

    dense = measure()
    rows = []
    for sparsity in SPARSITIES:
        teal, reached = sparse("teal", sparsity)
        wina, matched = sparse("wina", reached)
        rows.append({"sparsity": reached, "wina_sparsity": matched, "teal": teal, "wina": wina})
    means = {method: sum(row[method] for row in rows) / len(rows) for method in ("teal", "wina")}
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"gain in mean accuracy at equal sparsity, up to, percentage points": 2.94},
        measured={
            "dense_perplexity": math.exp(dense),
            "perplexity": [row | {method: math.exp(row[method]) for method in means} for row in rows],
            "mean_nats_per_token": means,
        },
        holds=means["wina"] < means["teal"],
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "sparsities": list(SPARSITIES),
            "allocation": "uniform",
            "calibration": {"text": f"{NUM_DOCUMENTS} modules of python", "num_samples": samples, "length": 512},
            "text": "held_out_python",
            "max_tokens": max_tokens,
            "length": 1024,
            "stride": 512,
        },
    )
