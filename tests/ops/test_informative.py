"""Scores of blocks against loops, and the choice among blocks."""

import pytest
import torch

from paucity.checks import InputError
from paucity.ops.informative import (
    activation_informativeness,
    block_informativeness,
    block_totals,
    keep_blocks,
    relative_scores,
    valid_blocks,
)


def naive_pairs(query, key, block, scale, valid):
    """Eq. 2 of LeMo, by loops: the largest mean over heads of the positive scores, of pairs i > j."""
    batch, heads, length, _ = query.shape
    count = -(-length // block)
    out = torch.zeros(batch, count, count)
    for b in range(batch):
        for i in range(length):
            for j in range(i):
                if not (valid[b, i] and valid[b, j]):
                    continue
                score = 0.0
                for h in range(heads):
                    dot = float(query[b, h, i] @ key[b, h * key.shape[1] // heads, j]) * scale
                    score += max(dot, 0.0) / heads
                out[b, i // block, j // block] = max(float(out[b, i // block, j // block]), score)
    return out


@pytest.mark.parametrize(("length", "block"), [(1, 4), (7, 3), (16, 4), (5, 9)])
def test_pairs_match_loops(length, block, monkeypatch):
    query, key = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8)
    valid = torch.rand(2, length) > 0.2
    wanted = naive_pairs(query, key, block, 0.3, valid)
    found = block_informativeness(query, key, block, scale=0.3, valid=valid)
    torch.testing.assert_close(found, wanted)
    monkeypatch.setattr("paucity.ops.informative._AT_ONCE", 1)  # one row of blocks at a time
    torch.testing.assert_close(block_informativeness(query, key, block, scale=0.3, valid=valid), wanted)
    assert not found.requires_grad


def test_totals_match_loops():
    pairs = torch.rand(2, 5, 5).tril()
    there = torch.tensor([[True] * 5, [False, True, True, True, True]])
    pairs[1, :, 0] = pairs[1, 0] = 0  # blocks of padding have no scores
    wanted = torch.zeros(2, 5)
    for b in range(2):
        for n in range(5):
            with_later = sum(float(pairs[b, m, n]) for m in range(n, 5))
            with_earlier = sum(float(pairs[b, n, m]) for m in range(n))
            wanted[b, n] = (with_later + with_earlier) / int(there[b].sum())
    wanted[1, 0] = 0
    torch.testing.assert_close(block_totals(pairs, there), wanted)


def test_activations_match_loops():
    activations, valid = torch.randn(2, 7, 5), torch.rand(2, 7) > 0.3
    wanted = torch.zeros(2, 3)
    for b in range(2):
        for t in range(7):
            if valid[b, t]:
                mean = float(activations[b, t].abs().sum()) / 5
                wanted[b, t // 3] = max(float(wanted[b, t // 3]), mean)
    torch.testing.assert_close(activation_informativeness(activations, 3, valid=valid), wanted)


def test_a_threshold_is_in_units_of_the_mean():
    score = torch.tensor([[1.0, 2.0, 3.0, 99.0], [4.0, 0.0, 0.0, 0.0]])
    there = torch.tensor([[True, True, True, False], [True] * 4])
    assert relative_scores(score, there)[0, :3].tolist() == [0.5, 1.0, 1.5]
    assert keep_blocks(score, there).tolist() == [[False, True, True, False], [True, False, False, False]]
    assert torch.equal(keep_blocks(score, there), keep_blocks(7 * score, there))
    assert keep_blocks(score, there, threshold=0.0).tolist() == there.tolist()
    assert keep_blocks(score, there, threshold=100.0).tolist() == [[False, False, True, False], [True, *[False] * 3]]
    assert keep_blocks(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.99])
def test_a_sparsity_is_that_of_each_text(sparsity):
    score = torch.rand(3, 10)
    there = torch.arange(10) < torch.tensor([[10], [7], [2]])
    kept = keep_blocks(score, there, sparsity=sparsity)
    for row, count in enumerate((10, 7, 2)):
        number = max(1, count - round(count * sparsity))
        best = score[row, :count].topk(number).indices
        assert sorted(kept[row].nonzero()[:, 0].tolist()) == sorted(best.tolist())


def test_blocks_of_padding_are_not_there():
    valid = torch.tensor([[False] * 4 + [True] * 3])
    assert valid_blocks(valid, 2).tolist() == [[False, False, True, True]]


def test_bad_input():
    x = torch.ones(1, 2, 4, 8)
    with pytest.raises(InputError, match="block_size must be at least 1, got 0"):
        block_informativeness(x, x, 0, scale=1.0)
    with pytest.raises(InputError, match=r"key must have shape \[1, any, 4, 8\]"):
        block_informativeness(x, torch.ones(1, 2, 5, 8), 2, scale=1.0)
    with pytest.raises(InputError, match="the heads of key must divide"):
        block_informativeness(torch.ones(1, 3, 4, 8), x, 2, scale=1.0)
    with pytest.raises(InputError, match="activations must have 3 dimensions"):
        activation_informativeness(torch.ones(2, 3), 2)
    there = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(InputError, match="threshold must be in"):
        keep_blocks(torch.ones(1, 3), there, threshold=-1.0)
    with pytest.raises(InputError, match="sparsity must be in"):
        keep_blocks(torch.ones(1, 3), there, sparsity=1.0)
