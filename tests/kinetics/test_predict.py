"""Seconds follow the rates of the machine, stage by stage, and the crossover is where attention takes over."""

import dataclasses

import pytest

from paucity.checks import InputError
from paucity.kinetics import attention_ratio, block_topk, crossover, decode, predict, prefill, shape_of, total_seconds


def test_a_step_by_hand(shape, machine):
    found = predict(shape, decode(shape, 9), machine)
    assert found.linear == pytest.approx(2 * 900 / 10)
    assert found.attention == pytest.approx((10 + 5 + 10) * 2 * 5 * 2 / 80)
    assert found.search == 0
    assert found.calls == pytest.approx(0.25 + 3 * 0.5)
    assert found.total == pytest.approx(found.linear + found.attention + found.moved + found.calls)


def test_a_prefill_by_hand(shape, machine):
    found = predict(shape, prefill(shape, 10), machine)
    assert found.linear == pytest.approx((2 * 10 * 700 + 2 * 200) / 100)  # ten rows lie half-way between 1 and 100
    assert found.attention == pytest.approx((55 + 40 + 55) * 2 * 4 * 5 / 50)


def test_a_sparse_step_by_hand(shape, machine):
    found = predict(shape, decode(shape, 99, reading=block_topk(4, block_size=10)), machine)
    assert found.attention == pytest.approx((4 + 4 + 4) * 2 * 5 * 2 / 40)
    read = (100 + 5 + 100) / 10 * 2 * 2 * 2
    products = (100 + 5 + 100) / 10 * 2 * 4 * 2
    assert found.search == pytest.approx(max(read / 100, products / 1000) + 3 * 8 * 0.125)


def test_many_queries_to_a_key_are_bound_by_arithmetic(shape, machine):
    one = predict(shape, decode(shape, 9), machine).attention
    eight = dataclasses.replace(shape, heads=16)
    assert predict(eight, decode(eight, 9), machine).attention == pytest.approx(4 * one)
    sixteen = dataclasses.replace(shape, heads=32)  # beyond what was measured arithmetic grows in proportion
    assert predict(sixteen, decode(sixteen, 9), machine).attention == pytest.approx(8 * one)
    together = predict(shape, decode(shape, 10**4, trials=4), machine).attention  # one reading for four trials
    apart = predict(shape, decode(shape, 10**4, trials=4, shared_prompt=False), machine).attention
    assert together == pytest.approx(apart, rel=1e-2)


def test_calls_run_beside_the_work_of_a_gpu(shape, machine):
    beside = predict(shape, decode(shape, 9), machine.model_copy(update={"device": "cuda"}))
    one = predict(shape, decode(shape, 9), machine)
    assert beside.total == pytest.approx(one.total - one.calls)
    both = total_seconds(shape, [decode(shape, 9), decode(shape, 9)], machine)
    assert both.total == pytest.approx(2 * one.total)


def test_the_crossover_is_where_attention_takes_over(shape, machine):
    found = crossover(shape, machine)
    shares = [predict(shape, decode(shape, context), machine).attention_share for context in (found - 1, found)]
    assert shares[0] <= 0.5 < shares[1]
    assert crossover(shape, machine, reading=block_topk(2, block_size=10**9)) is None
    bigger = dataclasses.replace(shape, linear=7000)
    assert crossover(bigger, machine) > found


def test_the_papers_ratio():
    shape = shape_of("embedded")
    group, cache, parameters = 2, 5 * 2 * 128, shape.linear + shape.head
    wanted = (2 * group * 100 * cache + (group + 562.5) * cache * 4096) / (2 * parameters)
    assert attention_ratio(shape, prompt=100, generate=4096) == pytest.approx(wanted)
    with pytest.raises(InputError, match="generate must be in"):
        attention_ratio(shape, prompt=0, generate=0)


def test_a_dtype_that_was_not_measured(shape, machine):
    with pytest.raises(InputError, match="Machine: dtype must be one of bfloat16, got float32"):
        predict(dataclasses.replace(shape, dtype="float32"), decode(shape, 1), machine)
