"""The claim on sparse ConvNets, at the size of a test."""

import pytest
import torch

from paucity.claims import sparse_convnet_frontier as claim
from paucity.measure.images import Images
from paucity.models.sites import find_sites
from paucity.models.vision import ConvNet
from paucity.weights.gradual import magnitude_masks

SHAPE = {"in_channels": 1, "image_size": 8}


def bright(count, seed):
    """Ten classes told apart by which pixels are bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    pixels = 0.2 * torch.randn(count, 1, 8, 8, generator=generator)
    pixels[torch.arange(count), 0, labels % 8, labels // 2] += 2
    return Images(pixels, labels, "bright")


def sparse(width):
    model = ConvNet(width=width, **SHAPE)
    magnitude_masks(model, find_sites(model, "pointwise"), sparsity=0.9).apply_(model)
    return model


def test_equal_flops_is_the_narrowest_that_does_as_much():
    x = torch.zeros(1, 1, 8, 8)
    width, work = claim._equal_flops(sparse(16), 16, SHAPE, x)
    assert 1 < width < 16
    assert work["dense"] >= work["sparse"]
    less = claim.flops(lambda: claim.fold_batchnorm(ConvNet(width=width - 1, **SHAPE))(x))
    assert less < work["sparse"]


def test_equal_time_gives_the_dense_network_the_doubt():
    width, times = claim._equal_time(sparse(16), 16, SHAPE, torch.zeros(1, 1, 8, 8), repeats=3)
    assert 4 <= width <= 16
    assert width == 16 or times["dense, equal time"] >= times["sparse"]


def test_verdicts_follow_from_the_intervals(monkeypatch):
    monkeypatch.setattr(claim, "small_pictures", lambda count, tests: (bright(192, 0), bright(96, 1)))
    result = claim.run(quick=True, width=8)
    measured = result.measured
    assert result.holds == all(measured["verdicts"].values())
    for name, change in measured["sparse minus dense"].items():
        ours, theirs = measured["accuracy by seed"]["sparse"][0], measured["accuracy by seed"][name][0]
        assert change["change"] == pytest.approx(ours - theirs)
        assert change["low"] <= change["change"] <= change["high"]
        assert measured["verdicts"][name] == (change["low"] > 0)
