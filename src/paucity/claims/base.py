"""What the reproduction of a paper's claim returns."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ClaimResult:
    """One claim, the paper's figures and ours.

    Args:
        claim: name, as in the catalogue.
        paper: arXiv number.
        statement: what is claimed, in one sentence.
        paper_figure: the paper's figures.
        measured: ours.
        holds: whether ours support the statement; computed.
        seconds: wall time.
        seed: of everything drawn.
        settings: model, data and sizes, enough to repeat it.
    """

    claim: str
    paper: str
    statement: str
    paper_figure: dict[str, Any]
    measured: dict[str, Any]
    holds: bool
    seconds: float
    seed: int
    settings: dict[str, Any]
