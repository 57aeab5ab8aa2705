"""Integer programmes: one option for each of several parts, at the least loss within budgets.

Solved by HiGHS through `scipy.optimize.milp`. Costs of all parts add up, so do losses.
"""

import ctypes
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from ..checks import check_int, check_ndim, check_range, check_shape, fail

TINY = 1e-9
"""Coefficients below it, of the largest of their row, count as 0."""

AUGMENT = 1e-4
"""Weight of the losses that are not minimised, beside the one that is; each as a share of its largest coefficient."""


def choose_options(
    loss: Tensor,
    cost: Tensor,
    budget: Sequence[float],
    *,
    groups: Sequence[int] | None = None,
    max_distinct: int | None = None,
    gap: float = 0.0,
    time_limit: float | None = None,
) -> Tensor:
    """The options with the least summed loss whose summed costs keep within every budget.

    Args:
        loss: ``[parts, options]`` float, finite.
        cost: ``[budgets, parts, options]`` float, finite.
        budget: one for each row of ``cost``; a relative 1e-6 may be passed, which is the solver's accuracy.
        groups: for each part the group that it is in; by default all are in one.
        max_distinct: different options that the parts of a group may have between them; None is any number.
        gap: relative distance from the least loss at which the solver may stop.
        time_limit: seconds after which the best choice found so far is returned.

    Returns:
        ``[parts]`` int64, the option of each.

    Raises:
        InputError: if a shape does not fit, or no choice is within the budgets (or none was found in time).

    Examples:
        >>> loss, cost = torch.tensor([[3.0, 1.0], [9.0, 1.0]]), torch.tensor([[[1.0, 2.0], [1.0, 2.0]]])
        >>> choose_options(loss, cost, [3.0])
        tensor([0, 1])
    """
    check_ndim("choose_options", "loss", loss, 2)
    found = _Programme(loss[None], cost, budget, groups, max_distinct, gap, time_limit).solve(0, {})
    if found is None:
        raise fail("choose_options", "budget", "be met by some choice", list(budget))
    return found


def pareto_options(
    losses: Tensor,
    cost: Tensor,
    budget: Sequence[float],
    *,
    num_intervals: int = 4,
    groups: Sequence[int] | None = None,
    max_distinct: int | None = None,
    gap: float = 0.0,
    time_limit: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Choices within the budgets of which none is as good in every loss as another and better in one.

    Epsilon constraints: the ranges that the losses have where each one in turn is least are cut into intervals, and
    each loss is minimised with the others held below every combination of the intervals' ends. The others also count
    `AUGMENT` in what is minimised, so that of equally good choices one that nothing dominates is found (Mavrotas 2009).

    Args:
        losses: ``[losses, parts, options]`` float, finite.
        cost: as for `choose_options`.
        budget: as for `choose_options`.
        num_intervals: of each range; ``losses * num_intervals ** (losses - 1)`` programmes are solved.
        groups: as for `choose_options`.
        max_distinct: as for `choose_options`.
        gap: as for `choose_options`.
        time_limit: seconds for each programme.

    Returns:
        The choices ``[front, parts]`` int64, and their losses ``[front, losses]`` float64, ascending by the first.

    Raises:
        InputError: as for `choose_options`.
    """
    check_ndim("pareto_options", "losses", losses, 3)
    check_int("pareto_options", "num_intervals", num_intervals)
    programme = _Programme(losses, cost, budget, groups, max_distinct, gap, time_limit)
    found: dict[tuple[int, ...], Tensor] = {}

    def note(choice: Tensor | None) -> None:
        if choice is not None:
            found[tuple(choice.tolist())] = programme.losses_of(choice)

    names = range(len(losses))
    for name in names:
        note(programme.solve(name, {}))
    if not found:
        raise fail("pareto_options", "budget", "be met by some choice", list(budget))
    values = torch.stack(list(found.values()))
    low, high = values.amin(0), values.amax(0)
    for name in names if len(found) > 1 else ():
        others = [other for other in names if other != name]
        for ends in itertools.product(range(1, num_intervals + 1), repeat=len(others)):
            limit = low[others] + (high - low)[others] * torch.tensor(ends) / num_intervals
            note(programme.solve(name, dict(zip(others, limit.tolist(), strict=True))))
    choices, values = torch.tensor(list(found)), torch.stack(list(found.values()))
    no_worse = (values[:, None] <= values[None]).all(-1)
    better = (values[:, None] < values[None]).any(-1)
    front = (~(no_worse & better).any(0)).nonzero().flatten()
    front = front[values[front, 0].argsort(stable=True)]
    return choices[front], values[front]


class _Programme:
    """Binary variables ``x[part, option]``, and ``y[group, option]`` where the options of a group are limited."""

    def __init__(
        self,
        losses: Tensor,
        cost: Tensor,
        budget: Sequence[float],
        groups: Sequence[int] | None,
        max_distinct: int | None,
        gap: float,
        time_limit: float | None,
    ) -> None:
        _, parts, options = losses.shape
        check_shape("choose_options", "cost", cost, len(budget), parts, options)
        for name, tensor in (("loss", losses), ("cost", cost)):
            if not tensor.isfinite().all():
                raise fail("choose_options", name, "be finite", "NaN or infinity")
        if groups is not None and len(groups) != parts:
            raise fail("choose_options", "groups", f"have an entry for each of {parts} parts", len(groups))
        self.losses = losses.detach().double().cpu()
        self.size = parts * options
        # Losses of any magnitude are solved to the same relative accuracy.
        self.unit = self.losses.abs().amax((1, 2)).clamp(min=1e-300)
        check_range("choose_options", "gap", gap, 0)
        self.options = {"mip_rel_gap": gap} | ({} if time_limit is None else {"time_limit": time_limit})
        dense = cost.detach().double().cpu().reshape(len(budget), -1).numpy()
        unit = np.maximum(np.abs(dense).max(1, initial=0), 1e-300)[:, None]
        one_each = sparse.kron(sparse.eye_array(parts), np.ones((1, options)))
        rows = [sparse.csr_array(dense / unit), one_each]
        low = [np.full(len(budget), -np.inf), np.ones(parts)]
        high = [np.asarray(budget, dtype=float) / unit[:, 0], np.ones(parts)]
        self.extra = 0
        if max_distinct is not None:
            check_int("choose_options", "max_distinct", max_distinct)
            member = sorted(set(groups or [0]))
            which = [member.index(group) for group in groups or [0] * parts]
            self.extra = len(member) * options
            of_group = sparse.csr_array((np.ones(parts), (np.arange(parts), which)), shape=(parts, len(member)))
            per_group = sparse.kron(sparse.eye_array(len(member)), np.ones((1, options)))
            rows = [sparse.hstack([row, sparse.csr_array((row.shape[0], self.extra))]) for row in rows]
            rows.append(sparse.hstack([sparse.eye_array(self.size), -sparse.kron(of_group, sparse.eye_array(options))]))
            rows.append(sparse.hstack([sparse.csr_array((len(member), self.size)), per_group]))
            low += [np.full(self.size, -np.inf), np.full(len(member), -np.inf)]
            high += [np.zeros(self.size), np.full(len(member), float(max_distinct))]
        self.constraint = LinearConstraint(sparse.vstack(rows), np.concatenate(low), np.concatenate(high))

    def solve(self, name: int, limits: dict[int, float]) -> Tensor | None:
        """The choice of least loss ``name`` with other losses at most ``limits``; None where there is none."""
        constraints = [self.constraint]
        if limits:
            rows = np.stack([self._row(other) for other in limits])
            ends = [limit / float(self.unit[other]) for other, limit in limits.items()]
            constraints.append(LinearConstraint(sparse.csr_array(rows), -np.inf, np.asarray(ends)))
        rest = [AUGMENT * self._row(other) for other in range(len(self.losses)) if other != name]
        with _stdout_untouched():
            found = milp(
                sum(rest, self._row(name)),
                integrality=np.ones(self.size + self.extra),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options=self.options,
            )
        if found.x is None:
            return None
        taken = torch.from_numpy(np.asarray(found.x[: self.size]))
        return taken.view(self.losses.shape[1:]).argmax(-1)

    def losses_of(self, choice: Tensor) -> Tensor:
        """Every loss of a choice, ``[losses]`` float64."""
        return self.losses.gather(-1, choice.expand(len(self.losses), -1).unsqueeze(-1)).sum((1, 2))

    def _row(self, name: int) -> np.ndarray:
        row = (self.losses[name] / self.unit[name]).flatten().numpy()
        row = np.where(np.abs(row) < TINY, 0.0, row)  # the solver ignores them, and then finds its answer infeasible
        return np.concatenate([row, np.zeros(self.extra)])


@contextmanager
def _stdout_untouched() -> Iterator[None]:
    """Send to stderr what C code prints meanwhile: HiGHS does, now and then, whatever its options, amid our JSON."""
    if sys.stdout is not None:
        sys.stdout.flush()
    _flush_c()
    try:
        saved = os.dup(1)
    except OSError:  # closed: nothing can be printed amid
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        _flush_c()  # what waits in C's buffer would come out after all
        os.dup2(saved, 1)
        os.close(saved)


def _flush_c() -> None:
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
