"""The estimate and the choice of vertical_slash, by loops."""

import math

import pytest
import torch
from pydantic import ValidationError

from paucity.attention.prompt import Prompt
from paucity.attention.vertical_slash import VerticalSlash, line_scores


def inputs(tq, tk, batch=2):
    generator = torch.Generator().manual_seed(tk)
    return torch.randn(batch, 4, tq, 8, generator=generator), torch.randn(batch, 2, tk, 8, generator=generator)


def naive_scores(query, key, *, num_last, window=None, softcap=None):
    batch, heads, tq, _ = query.shape
    tk = key.shape[2]
    columns, diagonals = torch.zeros(batch, heads, tk), torch.zeros(batch, heads, tk)
    for b in range(batch):
        for h in range(heads):
            for row in range(max(0, tq - num_last), tq):
                i = row + tk - tq
                seen = [j for j in range(i + 1) if window is None or j > i - window]
                logits = [float(query[b, h, row] @ key[b, h // 2, j]) * 0.3 for j in seen]
                if softcap is not None:
                    logits = [softcap * math.tanh(x / softcap) for x in logits]
                total = sum(map(math.exp, logits))
                for j, logit in zip(seen, logits, strict=True):
                    columns[b, h, j] += math.exp(logit) / total
                    diagonals[b, h, i - j] += math.exp(logit) / total
    return columns, diagonals


@pytest.mark.parametrize(("tq", "tk", "num_last"), [(1, 1, 64), (63, 63, 64), (70, 70, 8), (5, 40, 64), (30, 50, 16)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, 2.0)])
def test_scores_match_naive(tq, tk, num_last, window, softcap):
    query, key = inputs(tq, tk)
    prompt = Prompt(0, 0.3, softcap, window)
    for found, wanted in zip(
        line_scores(query, key, prompt, num_last=num_last),
        naive_scores(query, key, num_last=num_last, window=window, softcap=softcap),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_budgets_are_exact_for_every_head():
    query, key = inputs(60, 60, batch=3)
    policy = VerticalSlash(vertical_share=0.25, num_slash=11, forced_vertical=3, forced_slash=4)
    scores = line_scores(query, key, Prompt(0, 0.3))
    vertical, slash = policy.lines(*scores)
    assert vertical.sum(-1).tolist() == [[15] * 4] * 3
    assert slash.sum(-1).tolist() == [[11] * 4] * 3
    assert vertical[..., :3].all()
    assert slash[..., :4].all()
    unseen = torch.rand(1, 1, 60, generator=torch.Generator().manual_seed(0)) + (torch.arange(60) > 9)
    vertical_only, slash_only = policy.lines(unseen, unseen)
    assert vertical_only[..., :3].all()
    assert slash_only[..., :4].all()
    # What is not forced has the highest scores.
    free = scores[0][0, 0, 3:]
    assert set(free.topk(12).indices.tolist()) == set((vertical[0, 0, 3:]).nonzero().flatten().tolist())


def test_absolute_budgets_stop_at_the_length():
    assert VerticalSlash().budgets(500) == (500, 500)
    assert VerticalSlash().budgets(10_000) == (1000, 6096)
    assert VerticalSlash(vertical_share=0.001, slash_share=1.0).budgets(100) == (1, 100)


@pytest.mark.parametrize("options", [{"num_slash": 0}, {"slash_share": 0.0}, {"slash_share": 1.5}, {"slashes": 4}])
def test_bad_options(options):
    with pytest.raises(ValidationError):
        VerticalSlash(**options)


@pytest.mark.parametrize(("dropped", "forced"), [(0, 4), (3, 1), (9, 0)])
def test_a_dropped_start_is_not_forced(dropped, forced):
    query, key = torch.zeros(1, 2, 8, 4), torch.zeros(1, 1, 32, 4)
    key[..., 20:24, :] = 5
    query[:] = 5
    policy = VerticalSlash(num_vertical=4, num_slash=1, forced_vertical=4, forced_slash=1, q_block=8)
    positions = policy.select(query, key, Prompt(0, 1.0, dropped=dropped)).positions
    assert ((positions >= 0) & (positions < 4)).sum() == 2 * forced
