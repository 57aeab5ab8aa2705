"""The spans of heads, by loops."""

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import Prompt, Spans, from_json, to_json
from paucity.attention.spans import pair_share, span_of
from paucity.checks import InputError

SPANS = Spans(alpha=[0, [9, -6, 0, 30]], beta=[0.5, [0, 0.5, 0.25, 0]], num_sinks=3, block_size=4, q_block=8)


@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (23, 23), (9, 40), (40, 40)])
def test_every_head_sees_its_span_and_the_sinks(tq, tk):
    generator = torch.Generator().manual_seed(tk)
    query = torch.randn(2, 4, tq, 8, generator=generator)
    key, value = (torch.randn(2, 2, tk, 8, generator=generator) for _ in range(2))
    done = SPANS.attend(query, key, value, Prompt(layer=1, scale=0.5))
    for head, (alpha, beta) in enumerate([(9, 0), (-6, 0.5), (0, 0.25), (30, 0)]):
        blocks = 1
        while blocks * 4 < alpha + beta * tk:
            blocks += 1
        expected = [[j <= i and (j > i - blocks * 4 or j < 3) for j in range(tk)] for i in range(tk - tq, tk)]
        mask = torch.tensor(expected)
        logits = query[:, head] @ key[:, head // 2].mT * 0.5
        out = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ value[:, head // 2]
        torch.testing.assert_close(done.out[:, head], out, atol=1e-5, rtol=1e-5)
        assert (done.kept[:, head] == mask.sum()).all()
    assert SPANS.span(1, tk, 4)[0] == 12
    assert SPANS.span(0, tk, 4) == [SPANS.span(0, tk, 1)[0]] * 4


def test_spans_know_how_much_of_the_text_was_dropped_and_which_heads_they_are():
    query, key = torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 20, 8)
    some = Prompt(layer=1, dropped=20, heads=(1,), num_heads=4)
    assert SPANS.select(query, key, some).window_size == span_of(-6, 0.5, 40, 4) == 16
    assert SPANS.select(query, key, some).num_sinks == 0
    with pytest.raises(InputError, match=r"be asked for heads of one span, got \[4, 8, 12, 32\]"):
        SPANS.select(torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 20, 8), Prompt(layer=1))


def test_whole_blocks_never_fewer_than_asked():
    assert [span_of(0, 0.1, n, 64) for n in (1, 640, 641)] == [64, 64, 128]
    assert span_of(-5000, 1.0, 4096, 64) == 64
    assert pair_share(64, 0, 64) == 1
    assert pair_share(2, 1, 5) == 13 / 15 - 1 / 15


def test_lookahead_tells_whether_the_length_matters():
    assert SPANS.lookahead(40) == 40
    assert Spans(alpha=[[3, 4], 2], beta=0).lookahead(40) == 1


def test_of_a_model_and_back():
    SPANS.check_model([0, 1], 4, 2)
    assert from_json(to_json(SPANS)) == SPANS
    with pytest.raises(InputError, match="alpha must have 3 layers, got 2"):
        SPANS.check_model([0, 1, 2], 4, 2)
    with pytest.raises(InputError, match="alpha must have 2 heads in every layer, got 4"):
        SPANS.check_model([0, 1], 2, 2)


@pytest.mark.parametrize(
    "options",
    [{"beta": -0.1}, {"alpha": []}, {"alpha": [[]]}, {"alpha": float("inf")}, {"block_size": 0}, {"gamma": 1}],
)
def test_bad_options(options):
    with pytest.raises((ValidationError, InputError)):
        Spans(**{"alpha": 0, "beta": 0.5, **options})
