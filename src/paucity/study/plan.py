"""Study: methods × tasks × budgets × phases × lengths × seeds; a validated model, from YAML or built in Python."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..checks import InputError, check_choice, fail
from ..measure.prompts import TASKS
from ..recipe import one_line, read_yaml
from .methods import METHODS_AT, PHASES, Knob, Options, Phase, phase_of

PERPLEXITY, LM_EVAL, COST, DENSE = "perplexity", "lm-eval:", "cost", "dense"
Count = Annotated[int, Field(ge=1)]
Budget = Annotated[float, Field(gt=0, lt=1)]
if TYPE_CHECKING:
    Task = str
else:
    Task = Literal[(*TASKS, PERPLEXITY)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Line(_Strict):
    """A method whose frontier is measured. In YAML its name alone will do.

    Attributes:
        method: name in the catalogue.
        label: name on the page, the method's if not given.
        options: options that are the same at every budget, in place of those of `METHODS_AT`.
        at: options by budget, for a method that has no line there, or to have other ones.
    """

    method: str
    label: Annotated[str, Field(pattern=r"^[\w .+-]{1,40}$")] = ""
    options: dict[str, Any] = {}
    at: dict[float, dict[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        data = {"method": data} if isinstance(data, str) else data
        return {"label": data["method"], **data} if isinstance(data, dict) and "method" in data else data

    @property
    def phase(self) -> Phase:
        """The phase that the method makes sparse."""
        return phase_of(self.method)

    def options_at(self, budget: float, length: int) -> Options:
        """The options at a budget, or the knob that is still to be turned."""
        if budget in self.at:
            return self.at[budget] | self.options
        found = METHODS_AT[self.method](budget, length)
        if isinstance(found, Knob):
            return Knob(lambda value: found.options(value) | self.options, found.low, found.high)
        return found | self.options


@dataclass(frozen=True)
class Cell:
    """One measurement: of a line of the study, or of the dense model, whose budget is 1."""

    phase: Phase
    line: str
    budget: float
    task: str
    length: int
    seed: int

    @property
    def name(self) -> str:
        """Unique in a study, and good as the name of a file."""
        parts = (self.phase, self.line, f"{self.budget:g}", self.task, str(self.length), str(self.seed))
        readable = re.sub(r"[^\w.+-]", "_", "-".join(parts))[:120]
        return f"{readable}-{hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:12]}"


class Study(_Strict):
    """What is compared, on what, and how often. Lengths are in tokens.

    Attributes:
        methods: one line each.
        budgets: shares of the pairs or keys that the methods may read.
        num_prompts: prompts of a task with one seed; windows, of perplexity.
        seeds: sets of prompts.
        phases: those of the methods if not given.
        lm_eval: names of tasks of lm-eval, or YAML files of such tasks; they have lengths of their own, and measure
            prefill methods alone: likelihoods decode nothing.
        limit: documents of each of them, all if None.
        repeats: rounds of each time measured; 0 measures no cost.
        text: haystack, and what perplexity is measured on.
        calibration_text: what knobs are turned on.
    """

    title: str = "Which sparse attention, where, and at what cost"
    model: str = "embedded"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    methods: Annotated[tuple[Line, ...], Field(min_length=1)]
    tasks: tuple[Task, ...] = ("passkey", "key_value", "multi_value", "copying", PERPLEXITY)
    budgets: Annotated[tuple[Budget, ...], Field(min_length=1)] = (0.02, 0.05, 0.1, 0.2, 0.4)
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = PHASES
    lengths: Annotated[tuple[Count, ...], Field(min_length=1)] = (2048, 4096)
    num_prompts: Count = 50
    seeds: Count = 2
    lm_eval: tuple[str, ...] = ()
    limit: Count | None = None
    repeats: Annotated[int, Field(ge=0)] = 3
    text: str = "held_out_python"
    calibration_text: str = "python"

    @model_validator(mode="before")
    @classmethod
    def _phases_of_methods(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "phases" in data or not isinstance(data.get("methods"), list | tuple):
            return data
        found = _phases(data["methods"])
        return {**data, "phases": found} if found else data

    @model_validator(mode="after")
    def _fits_together(self) -> "Study":
        for field in ("tasks", "budgets", "phases", "lengths", "lm_eval"):
            values = getattr(self, field)
            if repeated := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
                raise fail("study", field, "name nothing twice", f"{repeated[0]} again")
        labels = [line.label for line in self.methods]
        for number, line in enumerate(self.methods):
            if labels.index(line.label) != number or line.label == DENSE:
                raise fail("study", f"methods[{number}].label", "be new", line.label)
            phase_of(line.method)  # refuses unknown names
            if not set(self.budgets) <= set(line.at):
                check_choice(
                    "study", f"methods[{number}].method (without `at` for every budget)", line.method, METHODS_AT
                )
        if not self.tasks and not self.lm_eval:
            raise fail("study", "tasks", "name at least one, unless lm_eval does", "none")
        for phase in self.phases:
            if not any(line.phase == phase for line in self.methods):
                raise fail("study", "phases", "be those of the methods", f"{phase}, which none of them makes sparse")
        if self.lm_eval and "prefill" not in self.phases:
            raise fail("study", "lm_eval", "come with methods that make the prefill sparse", "the decode phase alone")
        if not self.tasks and "decode" in self.phases:
            raise fail("study", "tasks", "name at least one for the decode phase, where lm_eval tells nothing", "none")
        return self

    @classmethod
    def build(cls, **fields: Any) -> "Study":
        """A study from Python values; lines may be names, or dicts as in YAML.

        Raises:
            InputError: on the first field that is wrong or unknown.
        """
        return cls._validated(fields, "study")

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """A study from a YAML file.

        Raises:
            InputError: if the file is absent, is no YAML mapping, or a field is wrong or unknown.
        """
        return cls._validated(read_yaml(path, "study"), str(path))

    @classmethod
    def _validated(cls, data: dict[str, Any], where: str) -> "Study":
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            known = Line if "methods" in error.errors()[0]["loc"][:-1] else cls
            raise one_line(error, where, list(known.model_fields)) from None

    def changed(self, **fields: Any) -> "Study":
        """The same study with other fields; those that are None stay as they are. New methods bring their phases."""
        given = {name: value for name, value in fields.items() if value is not None}
        kept = {name: value for name, value in self.model_dump().items() if name != "phases" or "methods" not in given}
        return self._validated(kept | given, "study")

    def to_yaml(self) -> str:
        """The study with every default written out, as YAML that `load` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def lines(self, phase: Phase) -> list[Line]:
        """Those of a phase."""
        return [line for line in self.methods if line.phase == phase]

    def cells(self) -> Iterator[Cell]:
        """Everything that is measured, what can run side by side first; then, one at a time, what is timed."""
        lengths = sorted(set(self.lengths))
        own = [(task, n, seed) for n in lengths for task in self.tasks for seed in range(self.seeds)]
        others = [(LM_EVAL + name, max(lengths), 0) for name in self.lm_eval]
        for phase in self.phases:
            tasks = own + (others if phase == "prefill" else [])
            yield from (Cell(phase, DENSE, 1.0, *task) for task in tasks)
            for line in self.lines(phase):
                yield from (Cell(phase, line.label, budget, *task) for budget in self.budgets for task in tasks)
        for phase in self.phases if self.repeats else ():
            for line in self.lines(phase):
                yield from (Cell(phase, line.label, b, COST, n, 0) for n in lengths for b in self.budgets)


def _phases(methods: Sequence[Any]) -> tuple[Phase, ...]:
    """The phases that lines make sparse; what is no line of a known method is refused elsewhere."""
    found = set()
    for line in methods:
        name = line.get("method") if isinstance(line, dict) else getattr(line, "method", line)
        with suppress(InputError):
            found.add(phase_of(str(name)))
    return tuple(phase for phase in PHASES if phase in found)


QUICK_METHODS: dict[Phase, tuple[str, ...]] = {
    "prefill": ("sink_window", "vertical_slash", "block_topk", "hierarchical"),
    "decode": ("quest", "snapkv", "streaming_llm"),
}
QUICK: dict[str, Any] = {
    "tasks": ("key_value", "multi_value", PERPLEXITY),
    "budgets": (0.03, 0.1, 0.3),
    "lengths": (2048,),
    "num_prompts": 8,
    "seeds": 1,
    "repeats": 2,
}
"""A study that two cores finish in minutes on the embedded model."""


def default_study(*, quick: bool = False, **fields: Any) -> Study:
    """The study of the command line: every method that has options by budget, or few with ``quick``.

    Args:
        quick: fewer methods, tasks, budgets and prompts.
        fields: those of `Study`; None is as if it were not given.

    Raises:
        InputError: as `Study.build` does.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    known: dict[Phase, tuple[str, ...]] = {
        phase: tuple(name for name in METHODS_AT if phase_of(name) == phase) for phase in PHASES
    }
    table = QUICK_METHODS if quick else known
    if "methods" in given:
        return Study.build(**(QUICK if quick else {}) | given)
    wanted = given.get("phases", tuple(phase for phase in PHASES if table[phase]))
    methods = tuple(name for phase in PHASES if phase in wanted for name in table[phase])
    return Study.build(**{"methods": methods, "phases": wanted} | (QUICK if quick else {}) | given)
