"""Influence of single entries of attention: by loops, and against what dropping them does."""

import math

import pytest
import torch

from paucity.checks import InputError
from paucity.ops import influence as module
from paucity.ops.formats.stripes import Window
from paucity.ops.influence import drop_influence, window_influence


def inputs(length, seed=0, sharp=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, length, 3), (2, 2, length, 3), (2, 2, length, 5), (2, 4, length, 5))
    query, key, value, grad = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return query * sharp, key, value, grad


def seen(i, length, window):
    return [j for j in range(length) if j <= i and (window is None or j > i - window)]


def attention_row(query, key, b, h, i, keys, scale, softcap):
    logits = [sum((query[b, h, i] * key[b, h // 2, j]).tolist()) * scale for j in keys]
    logits = logits if softcap is None else [softcap * math.tanh(x / softcap) for x in logits]
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


def naive(query, key, value, grad, scale, softcap, window, block, absolute):
    """The paper by loops."""
    batch, heads, length, _ = query.shape
    blocks = -(-length // block)
    result = torch.zeros(batch, heads, blocks, blocks, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                keys = seen(i, length, window)
                prob = attention_row(query, key, b, h, i, keys, scale, softcap)
                slope = [sum((grad[b, h, i] * value[b, h // 2, j]).tolist()) for j in keys]
                mean = sum(a * g for a, g in zip(prob, slope, strict=True))
                for j, a, g in zip(keys, prob, slope, strict=True):
                    effect = -a * (g - mean) / (1 - a) if len(keys) > 1 else 0.0
                    result[b, h, i // block, j // block] += abs(effect) if absolute else effect
    return result


@pytest.mark.parametrize(
    ("length", "block", "softcap", "window"),
    [(1, 4, None, None), (13, 4, None, None), (13, 5, 1.5, 6), (16, 4, None, 3)],
)
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_matches_naive(length, block, softcap, window, absolute, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    given, options = inputs(length), {"scale": 0.7, "softcap": softcap, "window": window}
    found = drop_influence(*given, **options, block_size=block, absolute=absolute)
    torch.testing.assert_close(found, naive(*given, 0.7, softcap, window, block, absolute))
    narrow = drop_influence(*(x.float() for x in given), **options, block_size=block, absolute=absolute)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), found, atol=1e-4, rtol=1e-4)


def test_for_a_linear_loss_it_is_what_dropping_does():
    """The output of a row without one entry, renormalised, times the gradient: exact, not only to first order."""
    query, key, value, grad = inputs(9, seed=1)
    found = drop_influence(query, key, value, grad, scale=0.5, block_size=1)
    for b, h, i, j in [(0, 0, 8, 0), (1, 3, 5, 5), (0, 2, 3, 1), (1, 1, 1, 0)]:
        rows = [value[b, h // 2, k] for k in range(i + 1)]
        prob = attention_row(query, key, b, h, i, range(i + 1), 0.5, None)
        before = sum(a * v for a, v in zip(prob, rows, strict=True))
        after = sum(a * v / (1 - prob[j]) for k, (a, v) in enumerate(zip(prob, rows, strict=True)) if k != j)
        assert found[b, h, i, j].item() == pytest.approx(float(((after - before) * grad[b, h, i]).sum()), abs=1e-9)


def test_rows_with_all_mass_on_one_key_are_exact_in_single_precision():
    given = inputs(12, seed=2, sharp=10.0)
    wide = drop_influence(*given, scale=1.0, block_size=1)
    narrow = drop_influence(*(x.float() for x in given), scale=1.0, block_size=1)
    torch.testing.assert_close(narrow.double(), wide, atol=1e-3, rtol=1e-3)
    assert wide.abs().max() > 1


@pytest.mark.parametrize("sinks", [0, 4])
def test_window_influence_is_that_of_all_left_out(sinks):
    given, sizes = inputs(16), [4, 8, 12, 16, 64]
    blocks = drop_influence(*given, scale=0.5, block_size=4, absolute=True)
    even = torch.ones_like(blocks).tril() * 16 - torch.eye(4) * 6  # every visible pair counts 1
    found = window_influence(even, sizes, num_sinks=sinks, block_size=4)
    for place, size in enumerate(sizes):
        left_out = 136 - Window(size, sinks).visible(16, 16).sum()
        assert (found[..., place] == left_out).all()
    losses = window_influence(blocks, sizes, num_sinks=sinks, block_size=4)
    assert (losses.diff(dim=-1) <= 0).all()
    assert (losses[..., -2:] == 0).all()


def test_bad_input():
    query, key, value, grad = inputs(8)
    with pytest.raises(InputError, match=r"grad must have shape \[2, 4, 8, 5\]"):
        drop_influence(query, key, value, grad[:, :, 1:], scale=1.0)
    with pytest.raises(InputError, match="block_size must be at least 1, got 0"):
        drop_influence(query, key, value, grad, scale=1.0, block_size=0)
    with pytest.raises(InputError, match=r"num_sinks must be a multiple of block_size \(4\), got 2"):
        window_influence(torch.zeros(2, 2), [4], num_sinks=2, block_size=4)
