"""The choice of xattention, by loops."""

import math

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import xattention
from paucity.attention.prompt import Prompt
from paucity.attention.xattention import XAttention, antidiagonal_mass


def inputs(tq, tk, batch=2):
    generator = torch.Generator().manual_seed(tk)
    return torch.randn(batch, 4, tq, 8, generator=generator), torch.randn(batch, 2, tk, 8, generator=generator)


def naive_mass(query, key, stride, q_block, k_block, window=None, softcap=None):
    """Mass of each pair of blocks of one head, for query ``[Tq, D]`` and key ``[Tk, D]``."""
    tq, tk = len(query), len(key)
    start = tk - tq
    mass = {}
    for mine in range(start // stride, math.ceil(tk / stride)):
        there = [i for i in range(mine * stride, (mine + 1) * stride) if start <= i < tk]
        logits = {}
        for theirs in range(mine + 1):
            if window is not None and (theirs + 1) * stride <= mine * stride - window + 1:
                continue
            total = 0.0
            for i in there:
                j = theirs * stride + stride - 1 - i % stride
                total += float(query[i - start] @ key[j]) if j < tk else 0.0
            logit = 0.3 * total / len(there)
            logits[theirs] = logit if softcap is None else softcap * math.tanh(logit / softcap)
        norm = sum(map(math.exp, logits.values()))
        for theirs, logit in logits.items():
            place = (mine * stride // q_block, theirs * stride // k_block)
            mass[place] = mass.get(place, 0.0) + math.exp(logit) / norm
    return mass


@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (63, 63), (66, 66), (31, 50), (3, 40)])
@pytest.mark.parametrize(("stride", "q_block", "k_block"), [(4, 8, 8), (4, 8, 16), (2, 12, 4), (1, 4, 4)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (19, 1.0)])
def test_mass_matches_naive(tq, tk, stride, q_block, k_block, window, softcap, monkeypatch):
    monkeypatch.setattr(xattention, "_ROWS", 5)
    query, key = inputs(tq, tk)
    prompt = Prompt(0, 0.3, softcap, window)
    found = antidiagonal_mass(query, key, prompt, stride=stride, q_block=q_block, k_block=k_block)
    first = (tk - tq) // q_block
    wanted = torch.zeros_like(found)
    for b in range(2):
        for h in range(4):
            for (i, j), mass in naive_mass(
                query[b, h], key[b, h // 2], stride, q_block, k_block, window, softcap
            ).items():
                wanted[b, h, i - first, j] = mass
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("tq", "tk"), [(63, 63), (31, 50)])
@pytest.mark.parametrize("first", [True, False])
def test_rows_keep_the_fewest_blocks_that_hold_the_threshold(tq, tk, first):
    query, key = inputs(tq, tk)
    policy = XAttention(q_block=8, k_block=8, stride=4, threshold=0.7, force_first=first)
    mask = policy.select(query, key, Prompt(0, 0.3))
    for b in range(2):
        for h in range(4):
            mass = naive_mass(query[b, h], key[b, h // 2], 4, 8, 8)
            for row, kept in enumerate(mask.blocks[b, h], (tk - tq) // 8):
                mine = [mass[row, j] for j in range(row + 1)]
                chosen = {row, 0} if first else {row}
                for j in sorted(set(range(row + 1)) - chosen, key=lambda j: -mine[j]):
                    if sum(mine[i] for i in chosen) >= 0.7 * sum(mine):
                        break
                    chosen.add(j)
                assert set(kept.nonzero().flatten().tolist()) == chosen


def test_a_dropped_start_is_not_forced():
    query, key = inputs(64, 64)
    policy = XAttention(q_block=8, k_block=8, stride=8, threshold=0.1)
    assert policy.select(query, key, Prompt(0, 0.3)).blocks[..., 0].all()
    assert not policy.select(query, key, Prompt(0, 0.3, dropped=8)).blocks[..., 0].all()


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"threshold": 1.1}, {"stride": 0}, {"block": 8}])
def test_bad_options(options):
    with pytest.raises(ValidationError):
        XAttention(**options)


def test_blocks_are_whole_groups():
    with pytest.raises(ValidationError, match=r"k_block must be a multiple of stride \(8\), got 100"):
        XAttention(k_block=100)


def test_sums_of_float16_do_not_overflow():
    query, key = (100 * x.half() for x in inputs(29, 29))
    sizes = {"stride": 8, "q_block": 8, "k_block": 8}
    mass = antidiagonal_mass(query, key, Prompt(0, 0.01), **sizes)
    assert mass.isfinite().all()
    wide = antidiagonal_mass(query.float(), key.float(), Prompt(0, 0.01), **sizes)
    torch.testing.assert_close(mass, wide, atol=0.05, rtol=0)
