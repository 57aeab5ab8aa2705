"""One ability of two models side by side: what either has, and how much of it changed, with intervals.

Abilities have different scales, so that they are compared by the relative change: of an accuracy, the part of what the
dense model has above chance; of anything else, of the dense model's figure. Pairs of the same questions make the
interval of a change narrower than those of both figures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .agreement import Agreement
from .stats import Estimate, ratio_interval, share_change, share_interval


@dataclass(frozen=True)
class Scores:
    """What one model got: a score for each sample over a weight of each (1 where none are given).

    ``chance`` is what guessing gets, None for what is no accuracy; ``texts`` are written answers.
    """

    scores: list[float]
    weights: list[float] | None = None
    chance: float | None = 0.0
    texts: list[str] = field(default_factory=list)

    def estimate(self, seed: int = 0) -> Estimate:
        """The mean with its interval: Wilson's for accuracies, a bootstrap for others."""
        if self.weights is None and self.chance is not None:
            return share_interval(self.scores)
        return ratio_interval(self.scores, self.weights or [1.0] * len(self.scores), seed=seed)


@dataclass(frozen=True)
class Ability:
    """An ability of a dense and a sparse model.

    Attributes:
        name: ``knowledge``, ``retrieval.key_value`` and the like.
        group: ``loss``, ``knowledge``, ``context``, ``summary``, ``choice`` or ``agreement``.
        title: what a reader is told.
        unit: ``share``, ``bits``, ``nats`` or ``perplexity``.
        num: questions, prompts, documents or tokens.
        dense: None where only the pair has a figure.
        change: relative, below 0 for less; None where the dense model is not above chance.
        lost: share of samples that only the dense model has right, None where nothing is right or wrong.
        gained: share that only the sparse model has right.
        chance: see `Scores`.
    """

    name: str
    group: str
    title: str
    unit: str
    num: int
    dense: Estimate | None
    sparse: Estimate
    change: Estimate | None
    lost: float | None = None
    gained: float | None = None
    chance: float | None = None


def paired(name: str, group: str, title: str, unit: str, dense: Scores, sparse: Scores, *, seed: int = 0) -> Ability:
    """Two models on the same samples.

    Raises:
        InputError: if the numbers of samples differ.
    """
    was, now = dense.estimate(seed), sparse.estimate(seed)
    told = (name, group, title, unit, len(dense.scores), was, now)
    if dense.weights is None and dense.chance is not None:
        change = _accuracy_change(dense, sparse, was)
        lost, gained = _flips(dense.scores, sparse.scores)
        return Ability(*told, change=change, lost=lost, gained=gained, chance=dense.chance)
    positive = was.value > 0 if was.low is None else was.low > 0
    change = ratio_interval(sparse.scores, dense.scores, seed=seed).mapped(lambda r: r - 1) if positive else None
    return Ability(*told, change=change)


def agreements(found: Agreement) -> list[Ability]:
    """Perplexity, loss, the same likeliest token and divergence, of one pass of both models over a text."""
    was, now = found.nats
    num, loss = found.num_tokens, "loss"
    same = found.same_top.mapped(lambda share: share - 1)
    flips = (found.lost, found.gained)
    perplexities = (was.mapped(_exp), now.mapped(_exp))
    return [
        Ability("perplexity", loss, "Perplexity", "perplexity", num, *perplexities, found.perplexity_change),
        Ability("loss", loss, "Loss per token", "nats", num, was, now, found.loss_change),
        Ability("same_top", "agreement", "Same likeliest token", "share", num, None, found.same_top, same, *flips),
        Ability("divergence", "agreement", "Divergence from dense (KL)", "nats", num, None, found.divergence, None),
    ]


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _accuracy_change(dense: Scores, sparse: Scores, was: Estimate) -> Estimate | None:
    chance = dense.chance or 0.0
    if was.low is None or was.low <= chance:
        return None
    above = was.value - chance
    lowest, highest = -was.value, 1 - was.value  # nothing is answered below 0 or above 1
    change = share_change(sparse.scores, dense.scores)
    return change.mapped(lambda points: min(max(points, lowest), highest) / above)


def _flips(dense: Sequence[float], sparse: Sequence[float]) -> tuple[float, float]:
    lost = sum(max(0.0, a - b) for a, b in zip(dense, sparse, strict=True)) / len(dense)
    return lost, sum(max(0.0, b - a) for a, b in zip(dense, sparse, strict=True)) / len(dense)
