import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from paucity.checks import InputError
from paucity.measure.cost import decode, decode_latency, prefill, prefill_latency, time_interleaved
from paucity.measure.flops import attention_flops, flops, flops_by_operator
from paucity.measure.memory import peak_memory_mb, weight_bytes


def test_time_interleaved():
    calls = []

    def wait(name, seconds):
        return lambda: (calls.append(name), time.sleep(seconds))

    result = time_interleaved(
        {"dense": wait("d", 0.02), "sparse": wait("s", 0.005)},
        repeats=3,
        warmup=1,
        prepare={"dense": wait("p", 0.05)},
    )
    assert "".join(calls) == "pds" + "spd" + "pds" + "spd"
    dense, sparse = result.timings["dense"], result.timings["sparse"]
    assert len(dense.values) == len(sparse.values) == 3
    assert 0.02 <= dense.min <= dense.median <= dense.max
    assert dense.min < 0.05  # what prepares is not in it
    assert result.speedup("dense") == result.paired_speedup("dense") == 1
    assert result.speedup("sparse") == pytest.approx(dense.median / sparse.median)
    assert result.speedup("sparse") > 1
    ratios = sorted(d / s for d, s in zip(dense.values, sparse.values, strict=True))
    assert result.scaled(1e3).paired_speedup("sparse") == pytest.approx(ratios[1])
    with pytest.raises(InputError, match="variants must hold at least one"):
        time_interleaved({})
    with pytest.raises(InputError, match="repeats must be at least 1"):
        time_interleaved({"a": int}, repeats=0)
    with pytest.raises(InputError, match="name one of a, got b"):
        time_interleaved({"a": int}, prepare={"b": int})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prefill_and_decode(llama, kind):
    model = llama
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    ids = torch.randint(300, (2, 9))
    logits, cache = prefill(model, ids)
    tokens = decode(model, logits, cache, 4)
    naive = ids
    for _ in range(4):
        with torch.no_grad():
            naive = torch.cat([naive, model.eval()(naive).logits[:, -1:].argmax(-1)], dim=1)
    assert logits.shape == (2, 1, 300)
    assert torch.equal(tokens, naive[:, 9:])
    assert cache.get_seq_length() == 13
    models = {"dense": model, "sparse": model}
    for result in (prefill_latency(models, ids, repeats=2), decode_latency(models, ids, num_tokens=2, repeats=2)):
        assert all(0 < t.min < 1000 and len(t.values) == 2 for t in result.timings.values())
    with pytest.raises(InputError, match=r"context of (64|2048) tokens, got 2050"):
        decode_latency(models, torch.zeros(1, 2048, dtype=torch.long), num_tokens=2)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize(("heads_kv", "rows", "keys"), [(4, 8, 8), (2, 8, 8), (1, 5, 9), (2, 9, 5)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_flops(inference, heads_kv, rows, keys, causal):
    q, k = torch.randn(3, 4, rows, 16), torch.randn(3, heads_kv, keys, 16)
    visible = sum(min(i + 1, keys) if causal else keys for i in range(rows))
    with torch.inference_mode(inference):
        got = flops(lambda: F.scaled_dot_product_attention(q, k, k, is_causal=causal, enable_gqa=heads_kv < 4))
    assert got == 3 * 4 * visible * (2 * 16 + 2 * 16)
    assert got == attention_flops(q.shape, k.shape, k.shape, is_causal=causal)


def test_attention_with_a_mask_and_backward():
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    forward = 2 * 8 * 8 * 64
    assert flops(lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask)) == forward
    assert flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == 3.5 * forward


def test_flops_of_products():
    w, zeros, x = torch.randn(5, 8), torch.zeros(5, 8), torch.randn(2, 3, 8)
    assert flops(lambda: F.linear(x, w)) == flops(lambda: F.linear(x, zeros)) == 2 * 6 * 8 * 5
    assert flops(lambda: w @ x[0, 0]) == 2 * 8 * 5
    assert flops(lambda: torch.addbmm(torch.zeros(3, 3), x, x.mT)) == 2 * 2 * 3 * 8 * 3
    assert flops(lambda: x + x) == 0
    a, experts, ends = torch.randn(6, 16), torch.randn(3, 16, 8), torch.tensor([1, 4, 6], dtype=torch.int32)
    assert flops(lambda: torch._grouped_mm(a.bfloat16(), experts.bfloat16(), offs=ends)) == 2 * 6 * 16 * 8


def test_flops_of_a_model(llama):
    length, layers = 11, 2
    weights = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    attention = 4 * (length * (length + 1) // 2) * 4 * 8
    ids = torch.randint(300, (1, length))
    assert flops(lambda: prefill(llama, ids)) == layers * (2 * length * weights + attention) + 2 * 32 * 300
    state = prefill(llama, ids)
    counts = flops_by_operator(lambda: decode(llama, *state, 1))
    assert counts["aten._scaled_dot_product_flash_attention_for_cpu"] == layers * 4 * 12 * 4 * 8
    assert counts["aten.mm"] == layers * 2 * weights + 2 * 32 * 300


def test_unknown_operators_are_named():
    @torch.library.custom_op("measure_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    with pytest.warns(UserWarning, match=r"no formula for measure_test\.double; counted as 0"):
        assert flops(lambda: double(torch.ones(3))) == 0


def test_peak_memory():
    def work():
        a, b = torch.empty(250_000), torch.empty(500_000)
        del a
        c = torch.empty(250_000)  # 3 MB held, as before it
        del b
        return c, torch.empty(100_000)

    assert peak_memory_mb(work) == 3.0
    inside = peak_memory_mb(lambda: torch.randn(1000, 1000).softmax(-1))
    assert 8.0 <= inside < 8.5
    tied = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False))
    tied[1].weight = tied[0].weight
    tied.register_buffer("more", torch.zeros(250))
    tied.register_buffer("view", tied.more[:10])
    assert weight_bytes(tied) == 41_000
    assert peak_memory_mb(work, model=tied) == 3.041


def test_peak_memory_of_a_model_is_repeatable(llama):
    ids = torch.randint(300, (1, 256))
    first, second = (peak_memory_mb(lambda: prefill(llama, ids), model=llama) for _ in range(2))
    assert first == second
    cache = 2 * 2 * 256 * 2 * 8 * 4 / 1e6
    assert first > weight_bytes(llama) / 1e6 + cache
