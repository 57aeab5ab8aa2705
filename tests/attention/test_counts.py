"""What a policy counts of its steps."""

import pickle

import pytest
import torch

from paucity.attention import Prompt, SparseLayer, StreamingDecode
from paucity.attention.site import Counts


@pytest.mark.parametrize("rounds", [0, 1, 700])
def test_shares_are_sums_over_everything_added(rounds):
    counts, kept, whole = Counts(), torch.zeros(2, 3).double(), torch.zeros(2).double()
    for step in range(rounds):
        batch, layer = 1 + step % 2, step % 2
        mine, there = torch.randint(5, (batch, 3 if step % 3 else 1)), torch.randint(5, 9, (batch, 1))
        counts.later(layer, 3, lambda mine=mine, there=there: (mine, there))
        kept[layer] += mine.sum(0)
        whole[layer] += there.sum()
    shares = counts.shares()
    assert list(shares) == [layer for layer in range(2) if whole[layer]]
    for layer, share in shares.items():
        torch.testing.assert_close(share, kept[layer] / whole[layer])


def test_nothing_to_count_is_no_share():
    counts = Counts()
    counts.add(0, 2, torch.zeros(1, 1), torch.zeros(1, 1))
    assert counts.shares() == {}


def test_counts_can_be_saved():
    counts = Counts()
    counts.add(0, 1, torch.ones(1, 1), torch.full((1, 1), 4))
    assert pickle.loads(pickle.dumps(counts)).shares()[0].tolist() == [0.25]


@pytest.mark.parametrize("few", [0, 2**14])
def test_counting_at_once_or_later_gives_the_same(few, monkeypatch):
    monkeypatch.setattr("paucity.attention.decode.policy._FEW", few)
    layer = SparseLayer()
    layer.update(*torch.randn(2, 2, 2, 40, 8))
    done = StreamingDecode(num_sinks=2, window_size=5, min_length=30).attend(
        torch.randn(2, 4, 1, 8), layer.cached(torch.tensor([0, 15])), Prompt(layer=0, scale=0.3)
    )
    assert done.kept.tolist() == [[7, 7], [25, 25]]  # the second text is below min_length
