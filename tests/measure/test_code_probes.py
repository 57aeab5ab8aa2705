"""Probes on few features, and absorption, on codes that are made so that the answer is known."""

import pytest
import torch

from paucity.checks import InputError
from paucity.measure.code_probes import Labelled, _absorbed, absorption, sparse_probe
from paucity.measure.token_tasks import first_letters, words
from paucity.models.load import byte_tokenizer
from paucity.ops.formats import Codes


def made(num, *, absorbed=0.0, seed=0):
    """Atom 0 is a feature; atom 1 stands in for it where it is absorbed; atoms 2 to 7 are noise."""
    g = torch.Generator().manual_seed(seed)
    atoms = torch.eye(8)
    atoms[1] = torch.tensor([0.8, 0.6, 0, 0, 0, 0, 0, 0])
    labels = torch.rand(num, generator=g) < 0.5
    taken = labels & (torch.rand(num, generator=g) < absorbed)
    dense = torch.zeros(num, 8)
    dense[:, 2:] = (torch.rand(num, 6, generator=g) < 0.3) * torch.rand(num, 6, generator=g)
    dense[labels & ~taken, 0] = 1
    dense[taken, 1] = 1.25
    return Labelled(dense @ atoms, Codes.from_dense(dense), labels.long()), atoms, taken & labels


def test_a_feature_of_the_class_is_probed():
    (train, _, _), (test, _, _) = made(200), made(150, seed=1)
    found = sparse_probe(train, test)
    assert found.features == (0,)
    assert found.accuracy.value == 1
    assert found.dense.value == 1
    assert found.change.value == 0
    assert found.change.low < 0 < found.change.high


def test_more_features_tell_more():
    (train, _, _), (test, _, _) = made(300, absorbed=0.4), made(300, absorbed=0.4, seed=1)
    one, two = (sparse_probe(train, test, k=k).accuracy for k in (1, 2))
    assert one.high < two.value == 1
    assert sparse_probe(train, test, k=2).features == (0, 1)


def test_no_absorption_and_all_of_it():
    for share in (0.0, 0.1):
        (train, atoms, _), (test, _, taken) = made(400, absorbed=share), made(400, absorbed=share, seed=1)
        # A split feature would be a main one: with few rows absorbed it adds less than 0.03 to F1 or is one.
        found = absorption(train, test, atoms, classes=[1, 7])
        assert found.left_out == (7,)
        expected = 0 if 1 in found.main[1] else float(taken.sum() / test.labels.sum())
        assert found.full.value == pytest.approx(expected, abs=1e-9)
        assert found.fraction.value == pytest.approx(expected, abs=1e-9)
        assert set(found.main[1]) <= {0, 1}


@pytest.mark.parametrize(
    ("code", "along", "wanted"),
    [
        ([0, 1.25, 0, 0], 1.0, (True, 1.0)),
        ([1, 0, 0, 0], 1.0, (False, 0.0)),
        ([0.5, 0.5, 0, 0], 1.0, (False, 0.4 / 0.9)),  # the rest is 0.5, of which 0.4 is made up
        ([0.5, 1.25, 0, 0], 1.0, (False, 0.5)),
        ([0, 0.4, 0, 0], 1.0, (False, 0.0)),  # less than 0.4 of the activation
        ([0, 0, 20, 0], 1.0, (True, 0.0)),  # cosine 0.05: enough for the one, not for the other
        ([0, 0, 0, -1.25], 1.0, (True, 1.0)),  # an opposite atom with a negative value
        ([0, 1.25, 0, 0], -1.0, (False, 0.0)),
    ],
)
def test_absorption_of_a_row(code, along, wanted):
    import numpy as np

    full, fraction = _absorbed(np.array(code, dtype=float), np.array([1, 0.8, 0.05, -0.8]), (0,), along)
    assert full is wanted[0]
    assert fraction == pytest.approx(wanted[1])


def test_first_letters():
    tokenizer = byte_tokenizer(300)
    assert words(tokenizer) == []
    with pytest.raises(InputError, match="tokenizer must have more than 5 words of one token, got 0"):
        first_letters(tokenizer)


def test_first_letters_of_the_embedded_tokenizer():
    from paucity.models.load import load

    tokenizer = load("embedded").need_tokenizer("test")
    ids, at, labels, known = first_letters(tokenizer, shown=2, seed=3)
    assert at == ids.shape[1] - 1
    assert len(ids) == len(labels) == len(known) > 500
    for row, label, word in list(zip(ids, labels, known, strict=True))[:50]:
        assert tokenizer.decode([row[at]]) == f" {word}"
        assert word[0].lower() == "abcdefghijklmnopqrstuvwxyz"[label]
        assert tokenizer.decode(row[:at]).endswith("\n")


def test_bad_input():
    (train, atoms, _), _ = made(20), None
    with pytest.raises(InputError, match=r"labels must have shape \[20\], got \[3\]"):
        Labelled(train.x, train.codes, torch.zeros(3))
    with pytest.raises(InputError, match="Labelled: x must be finite, got NaN or infinity"):
        Labelled(train.x / 0, train.codes, train.labels)
    same = Labelled(train.x, train.codes, torch.ones(20))
    with pytest.raises(InputError, match="the labels of test must be of two kinds, got 1"):
        sparse_probe(train, same)
    with pytest.raises(InputError, match="absorption: classes must hold one of which the probe finds 5 test rows"):
        absorption(train, train, atoms, classes=[9])
