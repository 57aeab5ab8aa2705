"""What every family hands back for a step that it has applied to a model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Applied(Protocol):
    """A step in force on a model, until it is removed."""

    def remove(self) -> None:
        """Restore the dense model exactly, weights included."""

    def density(self) -> dict[str, float]:
        """Achieved density (kept fraction, in [0, 1]) by site name, measured since the last reset.

        That of weights is static; that of activations and attention is what really ran.
        """
        ...

    def reset(self) -> None:
        """Start measuring density anew."""

    def state(self) -> dict[str, Any]:
        """Method, options and what calibration found, as JSON-able values: enough to create it again."""
        ...


@runtime_checkable
class Written(Protocol):
    """A step that found more than the weights of a model can say."""

    def write(self, folder: Path) -> None:
        """Write it to files of its own in ``folder``."""


class Combined:
    """Several applied steps as one.

    Args:
        steps: in the order in which they were applied; they are removed in the reverse order.
    """

    def __init__(self, steps: Sequence[Applied]) -> None:
        self.steps = list(steps)

    def remove(self) -> None:
        """Remove all steps, the last one first; a step that fails does not keep the others in force."""
        with ExitStack() as stack:
            for step in self.steps:
                stack.callback(step.remove)
        self.steps.clear()

    def density(self) -> dict[str, float]:
        """Densities of all steps; where two share a site the smaller one, which what both keep cannot exceed."""
        merged: dict[str, float] = {}
        for step in self.steps:
            for site, value in step.density().items():
                merged[site] = min(value, merged.get(site, value))
        return merged

    def reset(self) -> None:
        """Start measuring density anew in every step."""
        for step in self.steps:
            step.reset()

    def state(self) -> dict[str, Any]:
        """``{"steps": [state of each step]}``."""
        return {"steps": [step.state() for step in self.steps]}


@dataclass(frozen=True)
class Work:
    """What a job lends the step that is being applied.

    Attributes:
        folder: where a long step may keep what it has finished, so that the same job goes on there after a kill; None
            where nothing is kept.
        tell: called with a line about what is being done.
    """

    folder: Path | None = None
    tell: Callable[[str], object] = str  # a line that nobody reads


_NO_WORK = Work()
_work: ContextVar[Work] = ContextVar("_work", default=_NO_WORK)


@contextmanager
def working(work: Work) -> Iterator[None]:
    """Lend ``work`` to the steps that are applied within."""
    token = _work.set(work)
    try:
        yield
    finally:
        _work.reset(token)


def current_work() -> Work:
    """What is lent to the step that is being applied; nothing outside a job."""
    return _work.get()
