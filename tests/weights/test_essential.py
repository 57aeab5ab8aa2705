"""Essential sparsity."""

import json
import math

import pytest
import torch
from torch import nn

from paucity.checks import InputError
from paucity.models.load import Loaded, byte_tokenizer
from paucity.weights.essential import SPARSITIES, essential_sparsity, text_measure
from paucity.weights.magnitude import magnitude_mask


def net():
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


def weights(model):
    return torch.cat([model[0].weight.flatten(), model[2].weight.flatten()])


def energy(model):
    """A quality that falls with what is lost: the share of the squares of the weights still there."""
    return float(weights(model).detach().square().sum())


def test_each_point_is_global_magnitude_and_the_model_comes_back():
    model, seen = net(), []
    dense = weights(model).detach().clone()

    def measure(pruned):
        seen.append(weights(pruned).detach().clone())
        return energy(pruned)

    curve = essential_sparsity(model, measure, chance=0.0)
    assert torch.equal(weights(model), dense)
    assert [point.pattern for point in curve.points] == ["dense"] + ["unstructured"] * 19
    for sparsity, pruned in zip(SPARSITIES, seen[1:], strict=True):
        assert torch.equal(pruned, dense * magnitude_mask(dense[None], sparsity=sparsity)[0])
    for point, pruned in zip(curve.points, seen, strict=True):
        assert point.sparsity == pytest.approx(float((pruned == 0).float().mean()))
        assert point.kept == pytest.approx(float(pruned.square().sum() / dense.square().sum()), abs=1e-5)


def test_nm_keeps_the_largest_of_every_m_inputs():
    model, seen = net(), []
    dense = model[0].weight.detach().clone()
    curve = essential_sparsity(model, lambda m: seen.append(m[0].weight.detach().clone()) or energy(m), chance=0.0, m=8)
    assert [point.pattern for point in curve.points] == ["dense", *(f"{n}:8" for n in range(7, 0, -1))]
    for n, pruned in zip(range(7, 0, -1), seen[1:], strict=True):
        for row, old in zip(pruned.view(-1, 8), dense.view(-1, 8), strict=True):
            assert set(row.nonzero().flatten().tolist()) == set(old.abs().topk(n).indices.tolist())


def test_nm_of_a_convolution_runs_along_its_channels():
    model, seen = nn.Sequential(nn.Conv2d(8, 4, 3)), []
    essential_sparsity(
        model, lambda m: seen.append((m[0].weight != 0).clone()) or m[0].weight.abs().sum().item(),
        chance=0.0, m=4, sites=("conv",),
    )  # fmt: skip
    assert (seen[1].view(4, 2, 4, 3, 3).sum(2) == 3).all()
    assert (seen[3].view(4, 2, 4, 3, 3).sum(2) == 1).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_accuracies_and_losses_give_one_curve(sign):
    model = net()
    curve = essential_sparsity(model, lambda m: sign * energy(m) + 3, chance=3.0)
    reference = essential_sparsity(model, energy, chance=0.0)
    assert [p.kept for p in curve.points] == pytest.approx([p.kept for p in reference.points], abs=1e-5)
    assert curve.tolerated == pytest.approx(reference.tolerated, abs=1e-4)
    assert 0.1 < curve.tolerated < curve.knee.x < 0.8
    assert curve.knee.ratio > 3


def test_a_random_order_loses_at_once_and_follows_its_seed():
    model = net()
    curves = [essential_sparsity(model, energy, chance=0.0, order="random", seed=seed) for seed in (0, 0, 1)]
    assert curves[0].points == curves[1].points != curves[2].points
    assert curves[0].tolerated < 0.05
    assert [p.sparsity for p in curves[0].points] == pytest.approx([0, *SPARSITIES], abs=0.002)


def test_a_sparse_model_is_measured_from_there():
    model = net()
    model[0].weight.data.masked_fill_(~magnitude_mask(model[0].weight, sparsity=0.5), 0)
    curve = essential_sparsity(model, energy, chance=0.0)
    start = 0.5 * 384 / 576
    assert [p.sparsity for p in curve.points] == pytest.approx([start, *(s for s in SPARSITIES if s > start)], abs=2e-3)
    assert curve.notes == (
        "The model was 33.3% sparse before.",
        "6 patterns asked for remove nothing more and were left out.",
    )
    assert json.loads(json.dumps(curve.to_json()))["notes"] == list(curve.notes)


def test_a_broken_model_keeps_nothing():
    curve = essential_sparsity(net(), lambda m: 1.0 if (weights(m) != 0).float().mean() > 0.6 else math.inf, chance=9.0)
    assert {p.kept for p in curve.points if p.sparsity > 0.4} == {0.0}
    assert curve.tolerated == pytest.approx(0.4, abs=0.01)


def test_bits_per_byte_of_a_text(tiny_model):
    loaded = Loaded(tiny_model("llama", vocab_size=300), byte_tokenizer(300), "tiny")
    measure, chance = text_measure(loaded, "def f(x):\n    return x\n" * 20, length=64, stride=64)
    assert chance == pytest.approx(math.log2(300))  # every token is a byte
    assert essential_sparsity(loaded.model, measure, chance=chance, sparsities=[0.5]).points[0].quality == measure(
        loaded.model
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 5}, r"m must divide the input size of 0.weight \(16\), got 5"),
        ({"m": 4, "sparsities": [0.5]}, "sparsities must be left out with m"),
        ({"sparsities": [0.5, 0.4]}, "sparsities must rise"),
        ({"sparsities": [1.0]}, r"sparsities must be in \[0, 1\)"),
        ({"order": "wanda"}, "order must be one of magnitude, random"),
        ({"drop": 0.0}, r"drop must be in \(0, 1\)"),
        ({"sites": ("conv",)}, r"be in the model \(it has linear\)"),
        ({"chance": 1.0}, r"model must be better than chance \(1\) before pruning"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        essential_sparsity(net(), lambda _: 1.0, **({"chance": 0.0} | options))


def test_what_is_no_number_is_refused_and_the_weights_come_back():
    model = net()
    dense = weights(model).detach().clone()
    with pytest.raises(InputError, match="measure must return a number, got nan"):
        essential_sparsity(model, lambda m: 1.0 if (weights(m) != 0).all() else math.nan, chance=0.0)
    assert torch.equal(weights(model), dense)
    model[0].weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"finite weights, got NaN or infinity in 0\.weight"):
        essential_sparsity(model, energy, chance=0.0)
