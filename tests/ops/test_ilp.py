"""Integer programmes against all choices there are."""

import ctypes
import itertools
import os

import pytest
import torch

from paucity.checks import InputError
from paucity.ops import ilp
from paucity.ops.ilp import choose_options, pareto_options


def every_choice(loss, cost, budget, groups, max_distinct):
    """(losses, choice) of each choice that is allowed, by loops."""
    parts, options = loss.shape[1:]
    found = []
    for choice in itertools.product(range(options), repeat=parts):
        spent = [sum(row[p, o].item() for p, o in enumerate(choice)) for row in cost]
        kinds = max(len({o for o, g in zip(choice, groups, strict=True) if g == group}) for group in groups)
        if all(s <= b for s, b in zip(spent, budget, strict=True)) and kinds <= max_distinct:
            found.append((tuple(sum(row[p, o].item() for p, o in enumerate(choice)) for row in loss), choice))
    return found


def problem(seed, losses=1):
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(losses, 5, 4, generator=generator, dtype=torch.float64).sort(-1, descending=True).values
    cost = torch.rand(2, 5, 4, generator=generator, dtype=torch.float64).sort(-1).values
    budget = [float(row.mean() * 5) for row in cost]
    return loss, cost, budget, [0, 0, 0, 1, 1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_distinct", [1, 2, 4])
def test_choice_is_the_best_there_is(seed, max_distinct):
    loss, cost, budget, groups = problem(seed)
    allowed = every_choice(loss, cost, budget, groups, max_distinct)
    if not allowed:
        with pytest.raises(InputError, match="budget must be met by some choice"):
            choose_options(loss[0], cost, budget, groups=groups, max_distinct=max_distinct)
        return
    limit = None if max_distinct == 4 else max_distinct
    for unit in (1.0, 1e-12):  # losses of any magnitude
        found = choose_options(loss[0] * unit, cost, budget, groups=groups, max_distinct=limit)
        assert tuple(found.tolist()) == min(allowed)[1]


@pytest.mark.parametrize("seed", range(3))
def test_front_is_allowed_and_not_dominated(seed):
    loss, cost, budget, groups = problem(seed, losses=2)
    allowed = every_choice(loss, cost, budget, groups, 3)
    choices, values = pareto_options(loss, cost, budget, groups=groups, max_distinct=3, num_intervals=3)
    by_choice = {choice: losses for losses, choice in allowed}
    for choice, value in zip(choices.tolist(), values.tolist(), strict=True):
        assert by_choice[tuple(choice)] == pytest.approx(value)
        assert not any(a < value[0] - 1e-6 and b < value[1] - 1e-6 for a, b in by_choice.values())
    assert values[:, 0].tolist() == sorted(values[:, 0].tolist())
    for name in range(2):  # the ends of the front are the least of each loss
        assert values[:, name].min().item() == pytest.approx(min(v[name] for v in by_choice.values()))


def test_one_loss_is_a_front_of_one():
    loss, cost, budget, _ = problem(0)
    choices, _ = pareto_options(loss, cost, budget)
    assert torch.equal(choices, choose_options(loss[0], cost, budget)[None])


def test_bad_input():
    loss, cost, budget, groups = problem(0)
    with pytest.raises(InputError, match="budget must be met by some choice"):
        choose_options(loss[0], cost, [0.0, 0.0])
    with pytest.raises(InputError, match=r"cost must have shape \[1, 5, 4\]"):
        choose_options(loss[0], cost, [1.0])
    with pytest.raises(InputError, match="loss must be finite"):
        choose_options(loss[0].masked_fill(loss[0] > 0.5, torch.nan), cost, budget)
    with pytest.raises(InputError, match="groups must have an entry for each of 5 parts, got 4"):
        choose_options(loss[0], cost, budget, groups=groups[1:], max_distinct=1)
    with pytest.raises(InputError, match="max_distinct must be at least 1"):
        choose_options(loss[0], cost, budget, max_distinct=0)


@pytest.mark.skipif(os.name != "posix", reason="C's own buffers are not reached elsewhere")
def test_what_the_solver_prints_does_not_reach_stdout(monkeypatch, capfd):
    libc, milp = ctypes.CDLL(None), ilp.milp

    def talkative(*args, **kwargs):
        libc.puts(b"from C")  # stays in C's buffer where stdout is no terminal
        return milp(*args, **kwargs)

    monkeypatch.setattr(ilp, "milp", talkative)
    print("before")
    choose_options(torch.ones(1, 1), torch.ones(1, 1, 1), [1.0])
    print("after")
    libc.fflush(None)
    out, err = capfd.readouterr()
    assert out == "before\nafter\n"
    assert "from C" in err
