"""What is told of a prompt, against loops over the dense attention."""

import math
from functools import partial

import pytest
import torch
from transformers import DynamicCache

from paucity.attention import PerHead, Prompt, SinkWindow, VerticalSlash, apply, observe
from paucity.attention.compute import kept_pairs
from paucity.attention.watch import watch
from paucity.checks import InputError
from paucity.kernels.lines import line_lists

from .test_apply import model_of, tokens

MIXED = PerHead(
    choices=[
        SinkWindow(num_sinks=2, window_size=5),
        VerticalSlash(num_vertical=5, num_slash=3, forced_slash=2, q_block=8),
    ],
    assignment=[[0, 1, 1, 0], 0],
    min_length=8,
)


def captured(applied, ids, **inputs):
    """(query, key, value, prompt, done) of every layer."""
    seen = []
    watch(applied, seen.append, partial(applied.model, input_ids=ids, **inputs))
    return seen


def naive(query, key, done, prompt):
    """Density and recall of every head, by loops over queries and keys; patterns as masks."""
    batch, heads, tq, _ = query.shape
    tk = key.shape[2]
    density, recall = torch.zeros(heads), torch.zeros(heads)
    for part in done.parts:
        lead = 0 if not hasattr(part.pattern, "positions") else (tk - tq) % part.pattern.q_block
        mask = part.pattern.visible(tq + lead, tk)[:, :, lead:]
        mine = range(heads) if part.heads is None else part.heads
        for place, head in enumerate(mine):
            kept = pairs = 0
            for b in range(batch):
                seen = mask[min(b, len(mask) - 1), min(place, mask.shape[1] - 1)]
                for i in range(tq):
                    at = i + tk - tq
                    logits = [float(query[b, head, i] @ key[b, head // 2, j]) * prompt.scale for j in range(at + 1)]
                    weights = [math.exp(x - max(logits)) for x in logits]
                    kept += int(seen[i].sum())
                    pairs += at + 1
                    recall[head] += sum(w for j, w in enumerate(weights) if seen[i, j]) / sum(weights) / (batch * tq)
            density[head] = kept / pairs
    return density, recall


@pytest.mark.parametrize("chunks", [(40,), (14, 26), (16, 24)])
@torch.no_grad()
def test_density_recall_and_error_match_naive(chunks):
    model = model_of("llama")
    applied, cache, ids = apply(model, MIXED), DynamicCache(config=model.config), tokens(40, 2)
    for part in ids.split(chunks, dim=1):
        before = DynamicCache(config=model.config) if not cache.get_seq_length() else None
        told = captured(applied, part, past_key_values=before or copy_of(cache))
        seen = observe(applied, part, past_key_values=cache, cells=5)
        assert [entry.layer for entry in seen] == [0, 1]
        for entry, (query, key, value, prompt, done) in zip(seen, told, strict=True):
            density, recall = naive(query, key, done, prompt)
            torch.testing.assert_close(entry.density, density)
            torch.testing.assert_close(entry.recall, recall, atol=1e-5, rtol=1e-5)
            assert entry.picture.shape == (4, 5, 5)
            assert 0 <= entry.select_seconds <= entry.seconds
            wide = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
            seen_by = torch.ones(query.shape[2], key.shape[2]).tril(key.shape[2] - query.shape[2]).bool()
            exact = (query @ wide[0].mT * prompt.scale).masked_fill(~seen_by, -torch.inf).softmax(-1) @ wide[1]
            error = ((done.out - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))).mean(0)
            torch.testing.assert_close(entry.output_error, error, atol=1e-4, rtol=1e-4)
    assert applied.density() == {}


def copy_of(cache):
    import copy

    return copy.deepcopy(cache)


def test_a_picture_holds_the_share_of_every_cell():
    model = model_of("llama")
    seen = observe(apply(model, SinkWindow(num_sinks=0, window_size=10, min_length=0)), tokens(40), cells=4)
    mask = torch.ones(40, 40).tril().bool()
    kept = mask & ~torch.ones(40, 40).tril(-10).bool()
    wanted = (kept.view(4, 10, 4, 10).sum((1, 3)) / mask.view(4, 10, 4, 10).sum((1, 3))).expand(4, 4, 4)
    torch.testing.assert_close(seen[0].picture, wanted, equal_nan=True)


@pytest.mark.parametrize(("tq", "tk", "q_block"), [(40, 40, 8), (13, 40, 8), (16, 40, 8), (3, 5, 64)])
def test_pairs_of_a_block_that_lacks_its_front(tq, tk, q_block):
    generator = torch.Generator().manual_seed(0)
    vertical, slash = (torch.rand(2, 3, tk, generator=generator) < share for share in (0.2, 0.1))
    pattern = line_lists(vertical, slash, num_queries=tq, q_block=q_block)
    lead = (tk - tq) % q_block
    for window in (None, 7):
        mask = pattern.visible(tq + lead, tk, window=window)[:, :, lead:]
        assert torch.equal(kept_pairs(pattern, tq, tk, window=window), mask.sum((-1, -2)))


def test_texts_of_different_lengths_are_told_apart_and_short_ones_left_out():
    applied = apply(model_of("llama"), MIXED.model_copy(update={"layers": [1], "min_length": 20}))
    mask = torch.arange(40) >= torch.tensor([[0], [11], [30]])
    seen = observe(applied, tokens(40, 3), attention_mask=mask.long())
    assert sorted((entry.layer, entry.num_keys) for entry in seen) == [(1, 29), (1, 40)]


def test_bad_input():
    applied = apply(model_of("llama"), MIXED)
    with pytest.raises(InputError, match="cells must be at least 1, got 0"):
        observe(applied, tokens(40), cells=0)
    with pytest.raises(InputError, match="select must be asked for heads of one choice, got 2 choices"):
        MIXED.select(torch.zeros(1, 4, 9, 8), torch.zeros(1, 2, 9, 8), Prompt())
