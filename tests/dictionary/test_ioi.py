"""Supervised dictionaries on activations that are sums, edits by features, and prompts with known attributes."""

import pytest
import torch

from paucity.checks import InputError
from paucity.dictionary.ioi import code_edit, occluded, splitting, supervised, value_f1
from paucity.dictionary.ioi_task import LastToken, approximation, control, other_values, prompts
from paucity.models.load import byte_tokenizer
from paucity.ops.formats import Codes


def summed(num=600, noise=0.0):
    g = torch.Generator().manual_seed(0)
    vectors = [torch.randn(size, 10, generator=g).double() for size in (4, 3, 2)]
    labels = torch.stack([torch.randint(0, len(each), (num,), generator=g) for each in vectors], 1)
    labels[:, 1] = torch.where(torch.rand(num, generator=g) < 0.6, labels[:, 0] % 3, labels[:, 1])  # go together
    x = 5 + sum(each[labels[:, i]] for i, each in enumerate(vectors))
    return x + noise * torch.randn(x.shape, generator=g), labels, vectors


def test_least_squares_finds_the_parts_of_a_sum():
    x, labels, vectors = summed()
    found = supervised(x, labels)
    torch.testing.assert_close(found.reconstruct(labels), x)
    torch.testing.assert_close(found.mean, x.mean(0))
    for mine, own in zip(found.features, vectors, strict=True):
        torch.testing.assert_close(mine - mine[0], own - own[0])  # vectors are known up to what they share
    new = (labels[:, 0] + 1) % 4
    torch.testing.assert_close(found.edit(x, labels, 0, new), x - vectors[0][labels[:, 0]] + vectors[0][new])


def test_means_are_means():
    x, labels, _ = summed(noise=0.1)
    found = supervised(x, labels, method="means")
    for i in range(3):
        for value in range(int(labels[:, i].max()) + 1):
            mean = x[labels[:, i] == value].mean(0) - x.mean(0)
            torch.testing.assert_close(found.features[i][value], mean)
    errors = [
        (supervised(x, labels, method=m).reconstruct(labels) - x).square().mean() for m in ("means", "least_squares")
    ]
    assert errors[1] < errors[0]  # attributes that go together


def test_f1_by_loops():
    codes, values = Codes(torch.randn(40, 3).relu(), torch.randint(0, 9, (40, 3)), 9), torch.randint(0, 4, (40,))
    found, fires = value_f1(codes, values, 5), codes.to_dense() != 0
    for value in range(5):
        for atom in range(9):
            hits = (fires[:, atom] & (values == value)).sum()
            total = fires[:, atom].sum() + (values == value).sum()
            assert found[value, atom] == pytest.approx(float(2 * hits / total) if total else 0.0)


def test_an_edit_by_features_that_are_the_values_is_exact():
    atoms = torch.randn(6, 5)
    values, other = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
    extra = torch.tensor([3, 4, 5, 5])
    codes = Codes(torch.tensor([[1.0, 2.0]]).expand(4, 2).contiguous(), torch.stack([values, extra], 1), 6)
    changed = Codes(codes.values, torch.stack([other, extra], 1), 6)
    x = codes.decode(atoms) + 0.3  # what is not reconstructed stays
    f1 = torch.eye(3, 6).double()
    found = code_edit(x, codes, changed, atoms, f1, values, other, m=2)
    torch.testing.assert_close(found, changed.decode(atoms) + 0.3)
    none = code_edit(x, codes, changed, atoms, torch.zeros(3, 6), values, other, m=2)
    torch.testing.assert_close(none, x)


def test_splitting_and_occlusion():
    values = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0])
    whole = Codes(torch.ones(8, 1), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]).unsqueeze(1), 4)
    split = Codes(torch.ones(8, 1), torch.tensor([0, 0, 0, 2, 2, 2, 1, 1]).unsqueeze(1), 4)
    assert vars(splitting(whole, values, 1)) == {"precise": 1, "best_recall": 1.0, "recall": 1.0}
    assert vars(splitting(split, values, 1)) == {"precise": 2, "best_recall": 0.5, "recall": 1.0}
    assert vars(splitting(split, values, 0)) == {"precise": 0, "best_recall": 0.0, "recall": 0.0}  # twice is too few
    assert occluded([0.9, 0.2, 0.3], [2.0, 1.0, 3.0]) == [1]
    assert occluded([0.2, 0.2], [2.0, 1.0]) == []


@pytest.fixture
def digits():
    return prompts(byte_tokenizer(300), "recall", 12, values=4, seed=3)


def test_prompts_say_what_their_labels_do(digits):
    tokenizer = byte_tokenizer(300)
    assert len(digits.ids) == 12
    for row, (answer, other, order) in zip(digits.ids, digits.labels.tolist(), strict=True):
        text = tokenizer.decode(row)
        first, second = text.splitlines()[:2]
        asked = text.rpartition("for ")[2].partition(" is")[0]
        mine, its = (first, second) if order == 0 else (second, first)
        assert f"for {asked} is {1 + answer}" in mine
        assert f"is {1 + other}" in its
    labels = other_values(digits.labels, 0, 4, seed=1)
    assert (labels[:, 0] != digits.labels[:, 0]).all()
    assert (labels[:, 0] != labels[:, 1]).all()
    assert torch.equal(labels[:, 1:], digits.labels[:, 1:])
    assert (digits.changed(labels) != digits.ids).sum(1).tolist() == [1] * 12  # one digit
    assert torch.equal(digits.changed(digits.labels), digits.ids)
    assert (other_values(digits.labels, 2, 4)[:, 2] == 1 - digits.labels[:, 2]).all()


def test_the_true_activation_of_the_last_place_is_the_model(tiny_model, digits):
    model = tiny_model("llama", vocab_size=300)
    place = LastToken(model, "residual.1", digits.candidates)
    x, clean = place.activations(digits.ids), place.logits(digits.ids)
    with torch.no_grad():
        torch.testing.assert_close(clean, model(input_ids=digits.ids).logits[:, -1][:, digits.candidates])
    torch.testing.assert_close(place.logits(digits.ids, x), clean)
    assert control(clean, clean).value == 1
    assert control(clean, -clean).value == 0
    assert approximation(place, digits, clean, x, x.mean(0)) == pytest.approx(1, rel=1e-3)
    assert approximation(place, digits, clean, x.mean(0).expand_as(x), x.mean(0)) == pytest.approx(0, abs=1e-6)


def test_bad_input():
    with pytest.raises(InputError, match=r"labels must have shape \[3, any\], got \[4, 2\]"):
        supervised(torch.ones(3, 2), torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(InputError, match="method must be one of least_squares, means, got mean"):
        supervised(torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64), method="mean")
    with pytest.raises(InputError, match="tokenizer must have 8 names of one token, got 0"):
        prompts(byte_tokenizer(300), "ioi", 4)
    with pytest.raises(InputError, match="task must be one of ioi, recall, got greater"):
        prompts(byte_tokenizer(300), "greater", 4)
    with pytest.raises(InputError, match="value must be that of a row, got 3"):
        splitting(Codes(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), 2), torch.zeros(1).long(), 3)
