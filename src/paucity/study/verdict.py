"""What the rows of a study say: who leads where, how little may be read, and both in sentences."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..report.units import listed, percent
from .methods import Phase
from .plan import DENSE, PERPLEXITY
from .results import ALL_TASKS, FLOOR, CostRow, Result, Row

KEPT = 0.95
"""Share of the dense model's accuracy that counts as kept; of its bits per byte, 2 - this at most."""
SLACK = 1.2
"""A density counts as within a bound if it exceeds it by no more than this factor: budgets are met roughly."""
NAMES: dict[Phase, str] = {"prefill": "Prefill", "decode": "Decoding"}
READ: dict[Phase, str] = {"prefill": "of the query–key pairs", "decode": "of the cached keys"}


@dataclass(frozen=True)
class Tolerated:
    """The sparsest setting of a method that keeps every task; ``density`` is the most that it read in any of them."""

    method: str
    budget: float
    density: float


def kept(row: Row, dense: Row) -> bool:
    """Whether a row keeps `KEPT` of the dense model's figure."""
    return row.value >= KEPT * dense.value if row.is_accuracy else row.value <= (2 - KEPT) * dense.value


def telling_tasks(result: Result, phase: Phase, length: int) -> list[str]:
    """The tasks of a length on which something can be lost, without their mean."""
    found = (task for task, size in result.tasks(phase) if size == length and task != ALL_TASKS)
    return [task for task in found if result.telling(phase, task, length)]


def tolerated(result: Result, phase: Phase, length: int, tasks: list[str]) -> list[Tolerated]:
    """The sparsest setting of each method that keeps all ``tasks`` of a phase and length; see `sparsest`."""
    return sparsest([row for task in tasks for row in result.of(phase, task, length)])


def sparsest(rows: Sequence[Row]) -> list[Tolerated]:
    """The sparsest setting of each method that keeps every task, the sparsest first; methods without one are absent.

    Args:
        rows: of one phase and one length, those of the dense model among them; all their tasks count.
    """
    dense = {row.task: row for row in rows if row.method == DENSE}
    settings: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row.method != DENSE:
            settings.setdefault((row.method, row.budget), []).append(row)
    best: dict[str, Tolerated] = {}
    for (method, budget), mine in settings.items():
        if len(mine) == len(dense) and all(kept(row, dense[row.task]) for row in mine):
            density = max(row.density for row in mine)
            if method not in best or density < best[method].density:
                best[method] = Tolerated(method, budget, density)
    return sorted(best.values(), key=lambda found: found.density)


def leaders(result: Result, phase: Phase, task: str, length: int, bound: float) -> list[Row]:
    """The rows with the best figure among those that read ``bound`` at most; several where they are equal."""
    rows = [row for row in result.of(phase, task, length) if row.method != DENSE and row.density <= SLACK * bound]
    top = max((row.gain for row in rows), default=0.0)
    found: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.density):
        if row.gain == top:
            found.setdefault(row.method, row)
    return list(found.values())


def within_work(result: Result, phase: Phase, length: int, work: float) -> dict[str, tuple[Row, CostRow]]:
    """The best mean accuracy of each method with at most this share of the dense model's operations."""
    rows = {(row.method, row.budget): row for row in result.of(phase, _mean_task(result, phase, length), length)}
    found: dict[str, tuple[Row, CostRow]] = {}
    for cost in result.costs:
        if (cost.phase, cost.length) != (phase, length) or cost.work > work:
            continue
        row = rows.get((cost.method, cost.budget))
        if row is not None and (cost.method not in found or row.gain > found[cost.method][0].gain):
            found[cost.method] = (row, cost)
    return found


def _mean_task(result: Result, phase: Phase, length: int) -> str:
    """The mean of the tasks, or the one task that there is."""
    tasks = [task for task, size in result.tasks(phase) if size == length]
    return ALL_TASKS if ALL_TASKS in tasks else next((t for t in tasks if t != PERPLEXITY), PERPLEXITY)


def verdict(result: Result) -> list[str]:
    """What dominates where, in sentences that follow from the rows."""
    said, least = [], {}
    phases: list[Phase] = list(dict.fromkeys(row.phase for row in result.rows))
    lengths = sorted({row.length for row in result.rows})
    longest = lengths[-1]
    at = f" of {longest:,} tokens" if len(lengths) > 1 else ""
    for phase in phases:
        tasks = telling_tasks(result, phase, longest)
        found = tolerated(result, phase, longest, tasks) if tasks else []
        if found:
            least[phase] = found[0].density
            more = f", then {found[1].method} with {percent(found[1].density)}" if len(found) > 1 else ""
            said.append(
                f"{NAMES[phase]}{at}: {found[0].method} keeps {percent(KEPT, 0)} of the dense quality on every task "
                f"while it reads {percent(found[0].density)} {READ[phase]}{more}."
            )
        elif tasks:
            said.append(f"{NAMES[phase]}{at}: none of these methods keeps {percent(KEPT, 0)} on every task.")
    if len(least) == 2:
        first, second = sorted(least, key=lambda phase: least[phase])
        said.append(
            f"{NAMES[first]} bears more sparsity here than {NAMES[second].lower()}: {percent(least[first])} "
            f"against {percent(least[second])} read."
        )
    said += _no_single_best(result, phases)
    poor = list(
        dict.fromkeys(
            f"{row.task} ({percent(row.value, 0)})"
            for row in result.rows
            if row.method == DENSE and row.is_accuracy and row.value < FLOOR
        )
    )
    if poor:
        said.append(
            f"The dense model itself cannot do {listed(poor)}: nothing can be lost there, and it counts nowhere."
        )
    return said


def wins(result: Result) -> tuple[Counter[str], int]:
    """How often each method leads, alone or with others, and in how many comparisons.

    A comparison is a phase, a task that tells something, a length and a bound on the density; those in which all
    methods of the phase are equal decide nothing and are left out.
    """
    won: Counter[str] = Counter()
    total = 0
    for phase in dict.fromkeys(row.phase for row in result.rows):
        methods = {row.method for row in result.rows if row.phase == phase and row.method != DENSE}
        for task, length in result.tasks(phase):
            if task == ALL_TASKS or not result.telling(phase, task, length):
                continue
            for bound in result.plan["budgets"]:
                best = {row.method for row in leaders(result, phase, task, length, bound)}
                if best and best != methods:
                    total += 1
                    won.update(best)
    return won, total


def _no_single_best(result: Result, phases: list[Phase]) -> list[str]:
    won, total = wins(result)
    if not total or len({row.method for row in result.rows}) < 3:
        return []
    (name, most), *others = won.most_common()
    if most == total:
        return [f"{name} leads everywhere: in all {total} comparisons of task, phase and density."]
    rest = listed([f"{other} in {count}" for other, count in others[:2]])
    where = "task, phase and density" if len(phases) > 1 else "task and density"
    return [f"No method is best everywhere: of {total} comparisons of {where}, {name} leads in {most}, {rest}."]
