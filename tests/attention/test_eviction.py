"""Eviction policies against the papers' formulas by loops, their options, and storage in few bits."""

import math

import pytest
import torch
from pydantic import ValidationError

from paucity.attention.cache import SparseLayer
from paucity.attention.eviction import (
    AdaKV,
    ExpectedAttention,
    H2o,
    Knorm,
    PyramidKV,
    Quantised,
    SnapKV,
    StreamingLLM,
    Tova,
)
from paucity.attention.prompt import Prompt
from paucity.attention.rotary import Rotary
from paucity.ops.quantise import dequantise, quantise

HEADS, KV, DIM = 4, 2, 8
ROTARY = Rotary(torch.tensor([1.0, 0.3, 0.1]))  # of 8 dimensions 6 are turned
PROMPT = Prompt(layer=1, scale=0.4, softcap=4.0, num_layers=5, rotary=ROTARY)


def cached_of(length, *, batch=2, first=(0, 3), seed=0):
    """Queries ``[B, H, T, D]`` and what a layer has cached of them."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, HEADS, length, DIM, generator=generator)
    key, value = (torch.randn(batch, KV, length, DIM, generator=generator) for _ in range(2))
    layer = SparseLayer()
    layer.update(key, value)
    return query, key, value, layer, layer.cached(torch.tensor(first))


def weights(query, key, b, head, i, first, *, scale=0.4, softcap=4.0):
    """Attention of query ``i`` of a head, by loops: position -> weight."""
    logits = {}
    for j in range(first, i + 1):
        product = scale * sum(query[b, head, i, d].item() * key[b, head // 2, j, d].item() for d in range(DIM))
        logits[j] = softcap * math.tanh(product / softcap) if softcap else product
    total = sum(math.exp(x) for x in logits.values())
    return {j: math.exp(x) / total for j, x in logits.items()}


def check(score, wanted):
    """``score`` ``[B, Hkv, longest]`` against ``{(b, h, place): score}``."""
    for (b, h, place), value in wanted.items():
        assert score[b, h, place].item() == pytest.approx(value, rel=1e-4, abs=1e-6), (b, h, place)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_snapkv(pooling):
    query, key, _, _, cached = cached_of(12)
    policy = SnapKV(window_size=3, kernel_size=3, pooling=pooling)
    wanted = {}
    for b, first in enumerate((0, 3)):
        for h in range(KV):
            votes = dict.fromkeys(range(-1, 12), 0.0)
            for head in (2 * h, 2 * h + 1):
                for i in (9, 10, 11):
                    for j, weight in weights(query, key, b, head, i, first).items():
                        votes[j] += weight / 2 * (j < 9)
            for j in range(first, 12):
                near = [votes[j + d] if first <= j + d < 12 else 0.0 for d in (-1, 0, 1)]
                pooled = sum(near) / 3 if pooling == "avg" else max(near)
                wanted[b, h, j - first] = math.inf if j >= 9 else pooled
    check(policy.score(query, cached, PROMPT), wanted)


def test_h2o_adds_up_over_prompts_and_steps():
    query, key, _, layer, cached = cached_of(10)
    policy, first = H2o(num_keys=4), torch.tensor([0, 3])
    policy.observe(query, cached, PROMPT)
    more = torch.randn(2, HEADS, 1, DIM), torch.randn(2, KV, 1, DIM), torch.randn(2, KV, 1, DIM)
    layer.update(*more[1:])
    cached = layer.cached(first)
    policy.observe(more[0], cached, PROMPT)
    query, key = torch.cat([query, more[0]], 2), torch.cat([key, more[1]], 2)
    wanted = {}
    for b, start in enumerate((0, 3)):
        for h in range(KV):
            for j in range(start, 11):
                total = sum(
                    weights(query, key, b, head, i, start).get(j, 0.0) / 2
                    for head in (2 * h, 2 * h + 1)
                    for i in range(start, 11)
                )
                wanted[b, h, j - start] = math.inf if j >= 9 else total
    check(policy.score(more[0], cached, PROMPT), wanted)


def test_h2o_of_even_lists_is_that_of_uneven_ones():
    query, _, _, layer, _ = cached_of(40, batch=1)
    sums = []
    for start in (0, 0):
        cached = layer.cached(torch.tensor([start]))
        H2o().observe(query, cached, PROMPT)
        sums.append(cached.extra("h2o").clone())
        cached.set_extra("h2o", torch.zeros_like(sums[0]))
        cached.lengths = cached.lengths.clone()
        cached.lengths[0, 1] -= 1  # the other list is one shorter: the general way
    assert torch.allclose(sums[0][0, 0], sums[1][0, 0], atol=1e-5)


def test_tova():
    query, key, _, _, cached = cached_of(9)
    score = Tova().score(query, cached, PROMPT)
    for b, first in enumerate((0, 3)):
        rows = [weights(query, key, b, head, 8, first) for head in range(HEADS)]
        check(score, {(b, h, j - first): sum(row[j] for row in rows) / 4 for h in range(KV) for j in range(first, 9)})


def test_knorm_and_streaming():
    _, key, _, _, cached = cached_of(9)
    norm = Knorm().score(key[:, :1], cached, PROMPT)
    check(
        norm,
        {(b, h, j - f): -key[b, h, j].norm().item() for b, f in ((0, 0), (1, 3)) for h in (0, 1) for j in range(f, 9)},
    )
    keep = StreamingLLM(num_keys=5, num_sinks=2).keep(key, cached, PROMPT)
    assert keep[0, 0].nonzero().flatten().tolist() == [0, 1, 6, 7, 8]
    assert keep[1, 0].nonzero().flatten().tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("queries", [1, 3])
def test_streaming_attends_at_places_in_the_cache(queries):
    query, key, value, layer, cached = cached_of(14)
    policy = StreamingLLM(num_keys=6, num_sinks=2)
    layer.evict(policy.keep(query, cached, PROMPT), cached.starts, policy)
    more = [torch.randn(2, n, queries, DIM) for n in (HEADS, KV, KV)]
    layer.expected = True  # as the model that carries the policy says
    layer.update(*more[1:])
    out = policy.attend(more[0], layer.cached(torch.tensor([0, 3])), PROMPT)
    key, value = torch.cat([key, more[1]], 2), torch.cat([value, more[2]], 2)
    for b, first in enumerate((0, 3)):
        kept = [first, first + 1, 10, 11, 12, 13, *range(14, 14 + queries)]
        place = torch.arange(len(kept))
        for head in range(HEADS):
            # Brought to position 0 from where they were turned, and from there to their places in the cache.
            rows = ROTARY.turn(key[b, head // 2, kept], torch.tensor(kept), place)
            for i in range(queries):
                end = 6 + i + 1
                asks = ROTARY.turn(more[0][b, head, i : i + 1], torch.tensor([14 + i]), place[end - 1 : end])
                logits = 4.0 * torch.tanh(asks @ rows[:end].T * 0.4 / 4.0)
                wanted = logits.softmax(-1) @ value[b, head // 2, kept[:end]]
                torch.testing.assert_close(out[b, head, i], wanted[0], atol=1e-5, rtol=1e-5)


def test_streaming_without_reindexing_is_attention_over_what_is_left():
    query, _, _, layer, cached = cached_of(14)
    policy = StreamingLLM(num_keys=6, num_sinks=2, reindex=False)
    layer.evict(policy.keep(query, cached, PROMPT), cached.starts, policy)
    cached = layer.cached()
    assert torch.equal(policy.attend(query[:, :, -1:], cached, PROMPT), cached.attend(query[:, :, -1:], PROMPT))
    moved = StreamingLLM(num_keys=6, num_sinks=2).attend(query[:, :, -1:], cached, PROMPT)
    assert (moved - cached.attend(query[:, :, -1:], PROMPT)).abs().max() > 1e-2


def test_expected_attention():
    query, key, value, _, cached = cached_of(16)
    policy = ExpectedAttention(num_future=3, num_sinks=2, epsilon=0.01)
    prompt, wanted = Prompt(scale=0.4, rotary=ROTARY), {}
    for b, first in enumerate((0, 3)):
        for h in range(KV):
            mean_weight = torch.zeros(16)
            for head in (2 * h, 2 * h + 1):
                plain = torch.stack(
                    [ROTARY.turn(query[b, head, i : i + 1], torch.tensor([i]), torch.tensor([0]))[0] for i in range(16)]
                )[first + 2 :].double()
                mean = plain.mean(0)
                covariance = (plain - mean).T @ (plain - mean) / len(plain)
                turn = torch.zeros(DIM, DIM, dtype=torch.float64)
                for future in (16, 17, 18):
                    for d in range(DIM):
                        unit = torch.eye(DIM, dtype=torch.float64)[d : d + 1]
                        turn[:, d] += ROTARY.turn(unit, torch.tensor([0]), torch.tensor([future]))[0] / 3
                mean, covariance = turn @ mean, turn @ covariance @ turn.T
                keys = key[b, h].double()
                logits = torch.tensor([0.4 * k @ mean + 0.08 * k @ covariance @ k for k in keys])
                logits[: first + 2] = -math.inf
                mean_weight += (logits.softmax(-1) / 2).float()
            for j in range(first, 16):
                score = (mean_weight[j].item() + 0.01) * value[b, h, j].norm().item()
                wanted[b, h, j - first] = math.inf if j < first + 2 else score
    check(policy.score(query, cached, prompt), wanted)


def test_pyramid_is_an_arithmetic_progression():
    _, _, _, _, cached = cached_of(9)
    policy = PyramidKV(num_keys=108, window_size=8, beta=20.0)
    found = [int(policy.allowance(cached, Prompt(layer=layer, num_layers=5))[0, 0]) for layer in range(5)]
    assert found == [8 + 195, 8 + 148, 8 + 100, 8 + 52, 8 + 5]  # 2 * 100 - 5 down to 100 / 20, Eq. 3
    assert int(policy.allowance(cached, Prompt(layer=0, num_layers=1))[0, 0]) == 108


def test_ada_kv():
    query, _, _, _, cached = cached_of(20)
    policy = AdaKV(policy=Knorm(), num_keys=6, safeguard=0.5)
    keep, score = policy.keep(query, cached, PROMPT), Knorm().score(query, cached, PROMPT)
    for b, first in enumerate((0, 3)):
        lists = [sorted(((score[b, h, j].item(), j) for j in range(20 - first)), reverse=True) for h in range(KV)]
        chosen = {(h, j) for h in range(KV) for _, j in lists[h][:3]}
        rest = sorted(((s, h, j) for h in range(KV) for s, j in lists[h][3:]), reverse=True)
        chosen |= {(h, j) for _, h, j in rest[:6]}
        assert {tuple(pair) for pair in keep[b].nonzero().tolist()} == chosen
    assert keep.sum((1, 2)).tolist() == [12, 12]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_quantise(bits, dim):
    x = torch.randn(5, 7, 6) * torch.rand(5, 7, 1)
    x[0] = 1.5
    codes, low, step = quantise(x, dim, bits)
    assert (codes.dtype, codes.shape[-1]) == (torch.uint8, 6 * bits // 8)
    back = dequantise(codes, low, step, bits)
    wide = x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)
    assert ((back - x).abs() <= wide / (2**bits - 1) / 2 * 1.001 + 1e-6).all()
    assert (back - x).abs().max() > wide.max() / 2**bits / 8


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_entries_come_back_and_are_attended_to(bits):
    query, _, _, layer, cached = cached_of(50)
    layer.evict(cached.inside(), cached.starts, Knorm())
    store = layer.store
    before, keys = store.num_bytes, [x.clone() for x in (store.keys, store.values)]
    wanted = layer.cached().attend(query[:, :, -3:], PROMPT)
    store.pack(bits, 4, 7)
    assert store.num_entries.tolist() == [[50, 50], [47, 47]]
    assert store.lengths.tolist() == [[10, 10], [7, 7]]
    policy = Quantised(bits=bits)
    found = policy.attend(query[:, :, -3:], layer.cached(), PROMPT)
    torch.testing.assert_close(found, wanted, atol=0.3 if bits == 4 else 0.02, rtol=0)
    store.packed = store.packed.select_rows(torch.tensor([1, 0])).select_rows(torch.tensor([1, 0]))
    torch.testing.assert_close(policy.attend(query[:, :, -3:], layer.cached(), PROMPT), found)
    codes, scales, positions = 2 * 4 * DIM * bits // 8, 2 * (DIM + 4) * 4, 4 * 4
    assert store.packed.num_bytes == 40 * (codes + scales + positions) + 4 * (8 + 8)  # groups, lists
    store.unpack()
    assert store.packed is None
    assert store.num_entries.tolist() == [[50, 50], [47, 47]]
    torch.testing.assert_close(layer.cached().attend(query[:, :, -3:], PROMPT), found, atol=1e-5, rtol=1e-5)
    assert layer.cached().positions()[1, 0, :47].tolist() == list(range(3, 50))
    assert before == store.num_bytes
    assert all((old - new).abs().max() < 0.5 for old, new in zip(keys, (store.keys, store.values), strict=True))


def test_bad_options():
    for kind, options, message in (
        (SnapKV, {"kernel_size": 4}, "kernel_size must be odd, got 4"),
        (PyramidKV, {"kernel_size": 2}, "kernel_size must be odd, got 2"),
        (StreamingLLM, {"num_keys": 4}, r"streaming_llm: num_keys must be above num_sinks \(4\), got 4"),
        (Quantised, {"bits": 3}, "Input should be 4 or 8"),
        (Quantised, {"policy": StreamingLLM()}, "policy must have no attention of its own"),
        (AdaKV, {"policy": StreamingLLM()}, "policy must have no attention of its own"),
        (AdaKV, {"policy": {"method": "quantised"}}, "policy must have no attention of its own"),
        (AdaKV, {"policy": {"method": "nothing"}}, "nothing"),
        (H2o, {"recent": 1.5}, "less than or equal to 1"),
        (ExpectedAttention, {"num_future": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=message):
            kind(**options)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 2"):
        quantise(torch.ones(2, 2), 0, 2)
    with pytest.raises(ValueError, match=r"8 // bits must divide the last dimension \(3\)"):
        quantise(torch.ones(2, 3), 0, 4)
