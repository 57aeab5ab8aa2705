"""Figures of atoms and codes: against loops, and on dictionaries whose answer is known."""

import math

import pytest
import torch

from paucity.checks import InputError
from paucity.measure.codes import firing, mcc, stability
from paucity.ops.formats import Codes


def test_atoms_found_again():
    true = torch.linalg.qr(torch.randn(8, 8)).Q
    found = torch.cat([-2 * true[[3, 1, 5]], torch.zeros(2, 8)])
    assert mcc(true, found).value == pytest.approx(3 / 8)
    assert mcc(true, found[:3]).value == pytest.approx(3 / 8)  # what was not found counts 0
    assert mcc(true, found[:3], signed=True).value < 0.3
    assert mcc(true, true, signed=True).value == pytest.approx(1)


def test_stability_is_the_mean_over_pairs():
    one = torch.eye(4)
    turned = one[[2, 0, 1, 3]]
    half = torch.cat([one[:2], (one[2:] + one[[3, 2]]) / 2])
    found = stability([one, turned, half])
    pair = (2 + 2 * math.sqrt(0.5)) / 4
    assert found.value == pytest.approx((1 + 2 * pair) / 3)
    assert found.num_samples == 3
    assert stability([one, turned]).low is None
    with pytest.raises(InputError, match="stability: trainings must be at least 2, got 1"):
        stability([one])


def test_firing_is_that_of_dense_codes():
    batches = [Codes(torch.randn(3, 7, 4).relu(), torch.randint(0, 30, (3, 7, 4)), 30) for _ in range(3)]
    batches.append(Codes(torch.tensor([[1.0, 2.0]]), torch.tensor([[29, 29]]), 30))  # twice in a code counts once
    found = firing(batches)
    dense = torch.cat([codes.to_dense().view(-1, 30) for codes in batches]) != 0
    assert found.num_tokens == 64
    assert torch.equal(found.counts, dense.sum(0))
    assert found.dead == pytest.approx(float((~dense.any(0)).double().mean()))
    assert found.dense(0.1) == pytest.approx(float((dense.double().mean(0) > 0.1).double().mean()))
    assert found.dense(0.999) == 0


def test_signed_values_fire():
    found = firing([Codes(torch.tensor([[-1.0, 0.0]]), torch.tensor([[2, 0]]), 3)])
    assert found.counts.tolist() == [0, 0, 1]


def test_bad_input():
    with pytest.raises(InputError, match="firing: batches must hold at least one code, got none"):
        firing([])
    one, other = (Codes(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), size) for size in (3, 4))
    with pytest.raises(InputError, match="firing: batches must all have dict_size 3, got 4"):
        firing([one, other])
