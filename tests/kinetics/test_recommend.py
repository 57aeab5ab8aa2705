"""Plans and the choice among them."""

import dataclasses

import pytest

from paucity.checks import InputError
from paucity.kinetics import METHODS, Reading, Workload, plans, reading, recommend


@pytest.fixture
def options(shape, machine):
    larger = dataclasses.replace(shape, name="larger", parameters=8000, linear=7000)
    return plans([shape, larger], Workload(5000, 100), machine, budgets=(64, 512, 9999))


def test_every_model_dense_and_with_each_budget_that_leaves_keys_out(options):
    assert [(plan.shape.name, plan.num_keys) for plan in options] == [
        (name, keys) for name in ("hand", "larger") for keys in (None, 512, 64)
    ]
    dense, some, few = options[:3]
    assert dense.seconds > some.seconds > few.seconds
    assert dense.eflops > some.eflops > few.eflops


def test_a_limit_takes_the_largest_model_and_the_most_keys(options):
    smaller, larger = options[:3], options[3:]
    assert recommend(options, max_seconds=1e12).plan == larger[0]
    assert recommend(options, max_seconds=larger[1].seconds).plan == larger[1]
    assert recommend(options, max_seconds=larger[2].seconds).plan == larger[2]
    assert recommend(options, max_seconds=larger[2].seconds - 1).plan in smaller
    assert recommend(options, max_eflops=larger[1].eflops).plan == larger[1]
    nothing = recommend(options, max_seconds=1.0)
    assert nothing.plan == min(options, key=lambda plan: plan.seconds)
    assert "Nothing fits" in nothing.reasons[0]


def test_without_limits_attention_stops_dominating(options):
    found = recommend(options).plan
    assert found.shape.name == "larger"
    assert found.decode.attention_share <= 0.5
    assert next(plan.num_keys for plan in options[3:] if plan.decode.attention_share <= 0.5) == found.num_keys


def test_accuracies_decide_where_all_are_known(shape, machine):
    known = {("hand", "dense", None): 0.8, ("hand", "block_topk", 512): 0.8, ("hand", "block_topk", 64): 0.3}
    options = plans([shape], Workload(5000, 100), machine, budgets=(64, 512), accuracies=known)
    assert recommend(options).plan.num_keys == 512  # as accurate as dense, and faster
    assert recommend(options, max_seconds=options[2].seconds).plan.num_keys == 64
    partly = plans([shape], Workload(5000, 100), machine, budgets=(64, 512), accuracies={("hand", "dense", None): 0.8})
    assert "Without" in recommend(partly).reasons[0] or "Attention" in recommend(partly).reasons[0]


def test_other_methods_and_readings(shape, machine):
    own = Reading(name="own", density=0.1)
    found = plans([shape], Workload(500, 10), machine, methods=sorted(METHODS), budgets=(64,), readings=[own])
    assert [plan.method for plan in found] == ["dense", *sorted(METHODS), "own"]
    by_name = {plan.method: plan.decode.total for plan in found}
    assert by_name["window"] < by_name["block_topk"] < by_name["oracle_topk"]


def test_bad_input(shape, machine, options):
    short = dataclasses.replace(shape, context=100)
    with pytest.raises(InputError, match="prompt and answer must fit the 100 tokens of hand, got 101"):
        plans([short], Workload(100, 1), machine)
    for call, message in (
        (lambda: plans([], Workload(1, 1), machine), "shapes must hold at least one model"),
        (lambda: plans([shape], Workload(1, 1), machine, budgets=(0,)), "budgets must be at least 1"),
        (lambda: reading("block_topkk", 4), "did you mean 'block_topk'"),
        (lambda: recommend([]), "options must hold at least one plan"),
        (lambda: recommend(options, max_seconds=0), "max_seconds must be in"),
        (lambda: Reading(name="x"), "num_keys must be given or density"),
        (lambda: Reading(name="x", num_keys=1, density=0.5), "one of both"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
