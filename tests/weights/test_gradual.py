"""Gradual pruning while training."""

import itertools

import pytest
import torch
from torch import nn

from paucity.checks import InputError
from paucity.measure.images import Images
from paucity.models.vision import ConvNet
from paucity.ops.schedule import Cubic, Once
from paucity.training import train
from paucity.weights.gradual import GradualPruning, train_sparse


def images(count=64):
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 4, "noise")


def net():
    torch.manual_seed(0)
    return ConvNet(num_classes=4, width=4, depth=3, image_size=8)


def zeros(model):
    return [float((block.pointwise.weight == 0).float().mean()) for block in model.blocks]


def test_follows_the_schedule_and_never_brings_back():
    model, seen = net(), []
    pruning = GradualPruning(Cubic(sparsity=0.8, start=2, end=12, every=2))

    def watch(step):
        pruning(step)
        seen.append((zeros(model), [block.pointwise.weight != 0 for block in model.blocks]))

    train(model, images(), epochs=4, batch_size=16, on_step=watch)
    wanted = Cubic(sparsity=0.8, start=2, end=12, every=2)
    for index, (shares, _) in enumerate(seen):
        assert shares == pytest.approx([wanted(index)] * 3, abs=0.02), index
    for (_, before), (_, after) in itertools.pairwise(seen):
        assert all(bool((~one | two).all()) for one, two in zip(after, before, strict=True))
    assert zeros(model) == pytest.approx([0.8] * 3, abs=0.02)
    assert pruning.masks.achieved_in(model).achieved == pruning.masks.sparsity().achieved
    pruning.release()
    train(model, images(), epochs=1, batch_size=16)
    assert max(zeros(model)) < 0.7  # what comes from a dead channel gets no gradient


def test_removes_the_smallest_of_a_layer():
    model = net()
    result = train_sparse(model, images(), sparsity=0.75, epochs=2, batch_size=16, learning_rate=1e-9, weight_decay=0)
    masks, fresh = result.masks, net()
    for name, mask in masks.items():
        weight = fresh.get_parameter(name).detach().abs()
        assert weight[mask].min() >= weight[~mask].max()
    assert set(masks) == {f"blocks.{i}.pointwise.weight" for i in range(3)}
    assert result.history.num_steps == 8
    assert masks.nominal == 0.75


def test_erk_keeps_small_layers_denser():
    model = net()
    result = train_sparse(model, images(), sparsity=0.6, epochs=2, batch_size=16, allocation="erk")
    layers = list(result.masks.sparsity().layers.values())
    assert result.masks.sparsity().achieved == pytest.approx(0.6, abs=0.01)
    assert layers[0] < layers[-1]


def test_bad_input():
    model = net()
    with pytest.raises(InputError, match=r"reach the sparsity 0\.5 within the training, got 0\.37"):
        train_sparse(model, images(), sparsity=0.5, epochs=1, batch_size=16, schedule=Cubic(sparsity=0.5, end=8))
    with pytest.raises(InputError, match="kinds must be in the model"):
        train_sparse(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), images(), sparsity=0.5, epochs=1)
    with pytest.raises(InputError, match="schedule must never fall"):
        train(model, images(), epochs=1, batch_size=8, on_step=GradualPruning(lambda step: 0.5 - 0.1 * step))
    with pytest.raises(InputError, match="allocation must be one of erk, uniform"):
        GradualPruning(Once(0.5), allocation="owl")
    with pytest.raises(InputError, match="schedule must be a schedule, got float"):
        GradualPruning(0.5)
