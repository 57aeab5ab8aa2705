"""Claims of papers, one file each, reproduced at a size that two cores finish in minutes."""

import importlib
from dataclasses import dataclass

from .base import ClaimResult


@dataclass(frozen=True)
class Claim:
    """A claim that can be run: its module here, the paper's arXiv number, and what is stated."""

    module: str
    paper: str
    statement: str


CLAIMS: dict[str, Claim] = {
    "dhsa-beats-block-sparse": Claim(
        "dhsa_beats_block_sparse",
        "2510.24606",
        "At equal density, DHSA keeps a language model and its retrieval better than block-sparse attention does.",
    ),
    "wanda-beats-magnitude": Claim(
        "wanda_beats_magnitude",
        "2306.11695",
        "At 50 % unstructured sparsity, without retraining, Wanda keeps a language model better than magnitude does.",
    ),
    "wina-beats-teal": Claim(
        "wina_beats_teal",
        "2505.19427",
        "At equal sparsity, ranking inputs by |x|·‖W column‖ (WINA) keeps more quality than by |x| alone (TEAL).",
    ),
}


def run_claim(name: str, *, quick: bool = False, seed: int = 0) -> ClaimResult:
    """Run the claim called ``name``; ``quick`` takes at most 30 seconds on two cores, otherwise 3 minutes."""
    module = importlib.import_module(f"{__name__}.{CLAIMS[name].module}")
    result: ClaimResult = module.run(quick=quick, seed=seed)
    return result
