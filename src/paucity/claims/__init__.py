"""Claims of papers, one file each, reproduced at a size that two cores finish in minutes."""

import importlib

from .base import ClaimResult
from .table import CLAIMS, Claim

__all__ = ["CLAIMS", "Claim", "ClaimResult", "run_claim"]


def run_claim(name: str, *, quick: bool = False, seed: int = 0) -> ClaimResult:
    """Run the claim called ``name``; ``quick`` takes at most 30 seconds on two cores, otherwise 3 minutes."""
    module = importlib.import_module(f"{__name__}.{CLAIMS[name].module}")
    result: ClaimResult = module.run(quick=quick, seed=seed)
    return result
