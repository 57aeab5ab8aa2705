import copy
import math

import pytest
import torch

from paucity.checks import InputError
from paucity.measure.agreement import _sums, agreement
from paucity.measure.quality import bits_per_byte

TEXT = "def f(x):\n    return abs(x) + 1\n" * 6


@pytest.fixture
def changed(llama):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return other


def test_a_model_agrees_with_itself(llama, tokenizer):
    found = agreement(llama, llama, tokenizer, TEXT, length=64)
    assert (found.same_top.value, found.lost, found.gained) == (1.0, 0.0, 0.0)
    assert found.divergence.value == pytest.approx(0, abs=1e-9)
    assert found.perplexity_change.value == found.loss_change.value == 0.0


def test_matches_token_by_token(llama, changed, tokenizer):
    length, ids = 48, tokenizer(TEXT, add_special_tokens=False)["input_ids"][:100]
    same = divergence = was = now = lost = gained = count = 0.0
    for at in range(0, len(ids), length - 1):
        piece = [0, *ids[at : at + length - 1]]
        for i in range(1, len(piece)):
            with torch.no_grad():
                p, q = (
                    m(input_ids=torch.tensor([piece[:i]])).logits[0, -1].double().log_softmax(-1)
                    for m in (llama, changed)
                )
            divergence += float((p.exp() * (p - q)).sum())
            was, now, count = was - float(p[piece[i]]), now - float(q[piece[i]]), count + 1
            one, other = int(p.argmax()), int(q.argmax())
            same += one == other
            lost += one == piece[i] != other
            gained += other == piece[i] != one
    found = agreement(llama, changed, tokenizer, TEXT, length=length, max_tokens=100)
    assert found.num_tokens == count == 100
    assert found.same_top.value == pytest.approx(same / count)
    assert found.divergence.value == pytest.approx(divergence / count, rel=1e-4)
    assert found.perplexity_change.value == pytest.approx(math.exp((now - was) / count) - 1, rel=1e-4)
    assert found.loss_change.value == pytest.approx(now / was - 1, rel=1e-3)
    assert (found.lost, found.gained) == (pytest.approx(lost / count), pytest.approx(gained / count))
    assert 0 < found.same_top.value < 1


def test_losses_are_those_of_quality(llama, changed, tokenizer):
    found = agreement(llama, changed, tokenizer, TEXT, length=512)
    alone = bits_per_byte(changed, tokenizer, TEXT, length=512, stride=512)
    assert found.nats[1].value == pytest.approx(alone.nats_per_token.value, rel=1e-5)


def test_a_lone_last_token_is_counted(llama, tokenizer):
    found = agreement(llama, llama, tokenizer, TEXT, length=11, max_tokens=21)
    assert found.num_tokens == 21


def test_bad_input(llama, tokenizer, tiny_model):
    with pytest.raises(InputError, match="length must be at most the model's context"):
        agreement(llama, llama, tokenizer, TEXT, length=4096)
    with pytest.raises(InputError, match="vocabulary of 300 tokens, got 310"):
        agreement(llama, tiny_model("llama", vocab_size=310), tokenizer, TEXT, length=64)
    with pytest.raises(InputError, match="text must have at least 2 tokens"):
        agreement(llama, llama, tokenizer, "", length=64)
    with pytest.raises(TypeError, match="text must be a string"):
        agreement(llama, llama, tokenizer, 3)


def test_a_logit_that_is_no_number_agrees_with_nothing(llama, tokenizer):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight[0, 0] = float("nan")
    found = agreement(llama, other, tokenizer, TEXT, length=64)
    assert math.isnan(found.divergence.value)
    assert (found.same_top.value, found.gained) == (0, 0)
    assert [math.isnan(side.value) for side in found.nats] == [False, True]


def test_tokens_that_a_model_rules_out():
    inf, wanted = math.inf, torch.tensor([1])
    ruled_out, other = torch.tensor([[0.0, 0, -inf]]), torch.tensor([[1.0, 0, -inf]])
    assert math.isfinite(_sums(ruled_out, other, wanted)[1])
    assert _sums(torch.zeros(1, 3), other, wanted)[1] == inf
