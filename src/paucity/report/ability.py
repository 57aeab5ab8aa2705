"""Abilities beside perplexity, as they stand in report.json, and what they say in words."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from . import units

PART = ConfigDict(extra="forbid", ser_json_inf_nan="strings")
"""Of every part of a report: unknown keys are refused, infinite figures are kept as such."""

LOWER_IS_BETTER = ("loss",)
"""Groups in which a rise is for the worse."""


class Figure(BaseModel):
    """A figure with its 95 % interval, None where there is none."""

    model_config = PART

    value: float
    low: float | None = None
    high: float | None = None
    num_samples: int | None = None
    confidence: float = 0.95


class Ability(BaseModel):
    """What a dense and a sparse model can do of one thing; see `paucity.measure.abilities.Ability`.

    ``change`` is relative: of an accuracy, the part of what dense has above ``chance``. ``lost`` and ``gained`` are the
    shares of samples that only one of the two has right.
    """

    model_config = PART

    name: str
    group: str
    title: str
    unit: str
    num: int
    dense: Figure | None = None
    sparse: Figure
    change: Figure | None = None
    lost: float | None = None
    gained: float | None = None
    chance: float | None = None

    def worsening(self) -> Figure | None:
        """The change with its sign so that more is worse."""
        found = self.change
        if found is None or self.group in LOWER_IS_BETTER:
            return found
        low, high = (None if end is None else -end for end in (found.high, found.low))
        return Figure(value=-found.value, low=low, high=high)

    def judgement(self) -> str:
        """``worse`` or ``better`` where the interval of the change says so; empty where neither is."""
        found = self.worsening()
        if found is None or self.group == "control" or found.low is None or found.high is None:
            return ""
        return "worse" if found.low > 0 else "better" if found.high < 0 else "within noise"


def said(abilities: Sequence[Ability]) -> list[str]:
    """What perplexity and the abilities say, in one sentence; nothing where perplexity or all abilities are missing."""
    by_name = {ability.name: ability for ability in abilities}
    asked = [a for a in abilities if a.group not in ("loss", "agreement", "control") and a.change is not None]
    loss = by_name["perplexity"].change if "perplexity" in by_name else None
    if loss is None or not asked:
        return []
    fallen = sorted((a for a in asked if a.judgement() == "worse"), key=lambda a: a.change.value if a.change else 0.0)
    start = f"Perplexity {'rises' if loss.value > 0 else 'changes'} by {units.percent(abs(loss.value))}"
    if not fallen:
        return [f"{start}; none of {units.count(len(asked))} abilities falls beyond its interval."]
    losses = [f"{a.title[0].lower()}{a.title[1:]} by {units.percent(-a.change.value)}" for a in fallen if a.change]
    return [f"{start}; beyond their intervals fall {units.listed(losses)}."]
