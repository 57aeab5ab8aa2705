"""What is recorded of a model, and lengths at which a policy begins to gain."""

import pytest
import torch

from paucity.attention import SinkWindow, VerticalSlash, apply, crossover, record
from paucity.attention.crossover import Crossover
from paucity.attention.watch import Seconds, attention_seconds
from paucity.checks import InputError

from .test_apply import logits, model_of, tokens


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_records_every_layer_and_leaves_the_model_as_it_was(kind):
    model, ids = model_of(kind), tokens(40, 2)
    dense, modules = logits(model, ids), [id(m) for m in model.modules()]
    seen = record(model, ids)
    assert [one.prompt.layer for one in seen] == [0, 1]
    assert all(one.query.shape[:3] == (2, 4, 40) and one.key.shape == one.value.shape for one in seen)
    assert torch.equal(logits(model, ids), dense)
    assert [id(m) for m in model.modules()] == modules
    assert record(model, ids, layers=[1])[0].prompt.layer == 1


def test_a_run_that_fails_leaves_the_model_as_it_was():
    model = model_of("llama")
    with pytest.raises(IndexError):
        record(model, torch.tensor([[5, 1000]]))
    apply(model, SinkWindow()).remove()


def test_times_are_of_the_same_attention_in_turns():
    seen = record(model_of("llama"), tokens(40))
    found = attention_seconds(VerticalSlash(num_vertical=3, num_slash=3), seen[0], repeats=3)
    assert 0 < found.select < found.sparse
    assert found.dense > 0


@pytest.mark.parametrize(
    ("faster", "tokens_wanted"), [([0, 1, 1], 20), ([1, 0, 1], 40), ([1, 1, 1], 10), ([1, 1, 0], None)]
)
def test_the_crossover_is_where_every_longer_prompt_gains(faster, tokens_wanted):
    times = tuple(Seconds(1.0 if gain else 3.0, 0.1, 2.0) for gain in faster)
    assert Crossover((10, 20, 40), times).tokens == tokens_wanted


def test_crossover_times_every_length_once():
    model, ids = model_of("llama"), tokens(40)
    found = crossover(model, SinkWindow(window_size=4, layers=[1]), ids, lengths=[32, 8, 8], repeats=1)
    assert found.lengths == (8, 32)
    assert len(found.seconds) == 2
    with pytest.raises(InputError, match=r"lengths must be in \[1, 40\], got 41"):
        crossover(model, SinkWindow(), ids, lengths=[41])
    with pytest.raises(InputError, match="lengths must hold at least one length"):
        crossover(model, SinkWindow(), ids, lengths=[])
