"""What the claims on fixed patterns are computed with, by loops."""

import pytest
import torch

from paucity.attention import Power, SinkWindow
from paucity.claims import power_receptive_field as power
from paucity.claims.fixed_patterns import answer, hidden_facts, mean_answers, pairs_of, window_of_cost
from paucity.claims.power_receptive_field import reached
from paucity.claims.sharded_union import _union
from paucity.models.load import Loaded, byte_tokenizer


@pytest.mark.parametrize("length", [1, 2, 37, 100])
@pytest.mark.parametrize("sinks", [0, 3])
def test_a_window_of_equal_cost_is_the_smallest_that_costs_as_much(length, sinks):
    wanted = pairs_of(Power(q_block=1, window_blocks=1, sink_blocks=sinks), length)
    found = window_of_cost(wanted, length, num_sinks=sinks)
    costs = [sum(min(i + 1, size + min(sinks, max(0, i + 1 - size))) for i in range(length)) for size in range(1, 101)]
    assert found.window_size == next(size for size, cost in enumerate(costs, 1) if cost >= wanted or size == length)
    assert pairs_of(found, length) >= wanted


def test_reached_is_every_path_through_the_layers():
    see = torch.rand(12, 12) < 0.2
    paths = {11}
    for row in reached(see, 4):
        paths |= {j for i in paths for j in range(12) if see[i, j]}
        assert set(row.nonzero().flatten().tolist()) == paths


def test_power_doubles_and_a_window_adds(monkeypatch):
    monkeypatch.setattr(power, "NUM_BLOCKS", 64)
    monkeypatch.setattr(power, "NUM_LAYERS", 5)
    row = power._growth(1, 0)
    assert row["power"] == [3, 7, 15, 31, 63]
    size = row["window"][0]
    assert row["window"] == [1 + (size - 1) * layer for layer in range(1, 6)]
    assert row["pairs"]["power"] <= row["pairs"]["window"]


def test_the_union_is_whole_for_different_shards_alone():
    row = _union(8, 4)
    assert row["different shards"] == 1.0
    assert row["one shard"] < 0.5


def test_answers_are_read_under_the_policy(tiny_model):
    loaded = Loaded(tiny_model("llama", vocab_size=300), byte_tokenizer(300), "tiny")
    loaded.model.config.max_position_embeddings = 1024
    questions = hidden_facts(loaded, "x = 1\n" * 200, task="passkey", length=400, num_prompts=2)
    assert {len(q.ids) + len(q.answer_ids) for q in questions} == {396}
    dense, sparse = (answer(loaded, questions, p) for p in (None, SinkWindow(num_sinks=1, window_size=9, min_length=0)))
    assert dense.density == 1.0
    assert sparse.density == pytest.approx(sum(min(i, 10) for i in range(1, 396)) / (395 * 396 / 2))
    assert 0 < dense.nats != sparse.nats
    ids = torch.tensor([[*questions[0].ids, *questions[0].answer_ids]])
    count = len(questions[0].answer_ids)
    with torch.no_grad():
        prob = loaded.model(input_ids=ids).logits[0].log_softmax(-1)
    wanted = -sum(prob[i - 1, ids[0, i]].item() for i in range(ids.shape[1] - count, ids.shape[1]))
    assert answer(loaded, questions[:1]).nats == pytest.approx(wanted, rel=1e-4)
    assert mean_answers([dense, sparse]).nats == pytest.approx((dense.nats + sparse.nats) / 2)
