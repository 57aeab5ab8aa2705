import math

import pytest
import torch

from paucity.checks import InputError
from paucity.measure.quality import bits_per_byte, perplexity, relative_change


@torch.no_grad()
def naive(model, ids, first, length, stride):
    """Each token by a forward pass of its own, over what its window shows before it."""
    nats = []
    for target in range(first, len(ids)):
        rounds = max(0, math.ceil((target - length) / stride))
        end = min(length + rounds * stride, len(ids) - 1)
        context = ids[max(0, end - length) : target]
        assert len(context) >= min(target, length - stride + 1)
        nats.append(-model(context[None]).logits[0, -1].log_softmax(-1)[ids[target]].item())
    return nats


@pytest.mark.parametrize(
    ("total", "length", "stride"), [(2, 8, 4), (9, 8, 4), (10, 8, 4), (40, 8, 8), (41, 8, 1), (37, 8, 3), (12, 40, 7)]
)
def test_perplexity_matches_naive(llama, total, length, stride):
    ids = torch.randint(300, (total,), generator=torch.Generator().manual_seed(total))
    nats = naive(llama, ids, 1, length, stride)
    got = perplexity(llama, ids[None], length=length, stride=stride)
    assert got.num_tokens == len(nats) == total - 1
    assert got.nats_per_token.value == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert got.perplexity.value == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert got.bits_per_byte is None
    assert sum(got.window_tokens) == total - 1
    assert set(got.window_tokens[1:-1]) <= {stride}


TEXT = "ab cé\n日本ab x" * 4


@pytest.mark.parametrize("bos", [True, False])
def test_bits_per_byte(llama, byte_tokenizer, bos):
    tokenizer = byte_tokenizer(bos=bos)
    plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(plain) == len(TEXT.encode()) - TEXT.count("ab")
    ids = torch.tensor(([0] if bos else []) + plain)
    nats = naive(llama, ids, 1, 16, 8)
    got = bits_per_byte(llama, tokenizer, TEXT, length=16, stride=8)
    assert got.num_tokens == len(plain) - (not bos)
    assert got.num_bytes == len(TEXT.encode()) - (0 if bos else 2)  # without BOS "ab" is not predicted
    assert got.bits_per_byte.value == pytest.approx(sum(nats) / math.log(2) / got.num_bytes, rel=1e-5)
    assert got.bits_per_byte.low < got.bits_per_byte.value < got.bits_per_byte.high


@pytest.mark.parametrize("max_tokens", range(2, 14))
def test_max_tokens_covers_whole_characters(llama, tokenizer, max_tokens):
    got = bits_per_byte(llama, tokenizer, TEXT, max_tokens=max_tokens)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][: got.num_tokens]
    covered = tokenizer.decode(ids)
    assert max_tokens - 3 < got.num_tokens <= max_tokens
    assert TEXT.startswith(covered)
    assert got.num_bytes == len(covered.encode())


def test_seeded_and_mode_restored(llama, tokenizer):
    seen = []
    llama.train()
    first = bits_per_byte(llama, tokenizer, TEXT, length=16, stride=8, seed=3, on_progress=lambda *a: seen.append(a))
    assert llama.training
    llama.eval()
    assert first == bits_per_byte(llama, tokenizer, TEXT, length=16, stride=8, seed=3)
    assert seen == [(i + 1, len(first.window_nats)) for i in range(len(first.window_nats))]


def test_relative_change(llama, tokenizer):
    base = bits_per_byte(llama, tokenizer, TEXT, length=16, stride=8)
    same = relative_change(base, base)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(InputError, match="over the windows of baseline"):
        relative_change(base, bits_per_byte(llama, tokenizer, TEXT, length=16, stride=4))


def test_bad_input(llama, tokenizer, byte_tokenizer):
    with pytest.raises(InputError, match=r"text must hold more than white space, got 2 characters\."):
        bits_per_byte(llama, tokenizer, " \n")
    with pytest.raises(InputError, match="longer than one token"):
        bits_per_byte(llama, byte_tokenizer(bos=False), "x")
    with pytest.raises(InputError, match=r"stride must be at most length \(8\), got 9\."):
        bits_per_byte(llama, tokenizer, TEXT, length=8, stride=9)
    with pytest.raises(InputError, match=r"length must be at most the model's context of 2048 tokens, got 2560\."):
        bits_per_byte(llama, tokenizer, "x" * 3000, length=2560)
    with pytest.raises(InputError, match="at least 2 tokens"):
        perplexity(llama, torch.zeros(1, dtype=torch.long))
    with pytest.raises(InputError, match="one sequence"):
        perplexity(llama, torch.zeros(2, 5, dtype=torch.long))
