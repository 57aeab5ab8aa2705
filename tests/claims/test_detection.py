"""The task of finding objects: canvases, what its precision is on known answers, and the arms of the claim."""

import pytest
import torch

from paucity.claims import detection, group_channel_pruning
from paucity.claims.detection import (
    CANVAS,
    NUM_CLASSES,
    SIDES,
    STRIDES,
    DetectionLoss,
    Detector,
    mean_average_precision,
)
from paucity.measure.images import Images


@pytest.fixture
def known(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    source = Images(torch.rand(64, 1, 28, 28, generator=generator) + 1, torch.arange(64) % 10, "made up")
    monkeypatch.setattr(detection, "read_images", lambda *args, **kwargs: source)
    return detection.scenes("train", 24, seed=3)


class Oracle(torch.nn.Module):
    """Says what is there, with a given share of wrong classes, and moved by some pixels."""

    def __init__(self, known, wrong=0, moved=0.0):
        super().__init__()
        self.known, self.wrong, self.moved = known, wrong, moved
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixels):
        outs = []
        for place, (side, stride) in enumerate(zip(SIDES, STRIDES, strict=True)):
            grid = CANVAS // stride
            out = torch.zeros(len(pixels), NUM_CLASSES + 3, grid, grid)
            out[:, NUM_CLASSES] = 20
            for index, corner in enumerate(self.known.corners[:, place].tolist()):
                centre = torch.tensor([(value + side / 2 + self.moved) / stride for value in corner])
                row, column = centre.long().clamp_max(grid - 1).tolist()
                label = int(self.known.classes[index, place]) + (1 if index < self.wrong else 0)
                out[index, label % NUM_CLASSES, row, column] = 40 - index / 100
                out[index, NUM_CLASSES + 1 :, row, column] = torch.logit(centre - torch.tensor([row, column]), eps=1e-6)
            outs.append(out)
        return tuple(outs)


def test_canvases_hold_a_small_and_a_large_object_apart(known):
    assert known.images.pixels.shape == (24, 1, 40, 40)
    for (small, large), pixels in zip(known.corners.tolist(), known.images.pixels, strict=True):
        bright = (pixels[0] > 1).nonzero()
        for corner, side in ((small, 12), (large, 20)):
            inside = ((bright >= torch.tensor(corner)) & (bright < torch.tensor(corner) + side)).all(1)
            assert int(inside.sum()) == side**2
        assert len(bright) == 12**2 + 20**2


def test_precision_of_known_answers(known):
    assert mean_average_precision(Oracle(known), known) == pytest.approx(1.0)
    assert mean_average_precision(Oracle(known, wrong=24), known) == 0.0
    assert mean_average_precision(Oracle(known, moved=1.0), known) == pytest.approx(1.0)
    assert mean_average_precision(Oracle(known, moved=6.0), known) < 0.3
    half = mean_average_precision(Oracle(known, wrong=12), known)
    assert 0.2 < half < 0.6


def test_the_loss_is_least_where_the_answers_are_right(known):
    loss, labels = DetectionLoss(known), torch.arange(24)
    right, moved, wrong = (
        loss(Oracle(known, *options), known.images.pixels, labels).item() for options in ((0, 0.0), (0, 1.0), (24, 0.0))
    )
    assert right < 1e-3
    assert right < moved < wrong


def test_arms_have_the_same_parameters(known, monkeypatch):
    monkeypatch.setattr(group_channel_pruning, "scenes", lambda *args, **kwargs: known)
    monkeypatch.setattr(group_channel_pruning, "Detector", lambda: Detector(4))
    monkeypatch.setattr(group_channel_pruning, "_BATCH", 24)
    arms = group_channel_pruning._arms(24, 1, 1, seed=0)
    assert arms["dense"][1:] == (1.0, 1.0)
    assert len(arms) == 5
    for name, (precision, parameters, work) in arms.items():
        assert 0 <= precision <= 1
        assert name == "dense" or parameters == pytest.approx(0.353, abs=0.05)
        assert name == "dense" or 0 < work < 1


@pytest.mark.parametrize(("all_three", "holds"), [(0.48, True), (0.46, False), (0.43, False)])
def test_the_verdict_is_computed(monkeypatch, all_three, holds):
    """Little is lost, and no more than with one threshold, which has 0.47 of the dense detector's 0.5."""
    names = {
        "dense": 0.5,
        "all three": all_three,
        "one threshold": 0.47,
        "constant rate": 0.4,
        "without distilling": 0.5,
    }
    arms = {name: (value, 0.353, 0.4) for name, value in names.items()}
    monkeypatch.setattr(group_channel_pruning, "_arms", lambda *args, **kwargs: arms)
    result = group_channel_pruning.run(quick=True, seed=1)
    assert result.holds is holds
    assert result.settings["seeds"] == [1, 2]
    assert result.measured["mAP@0.5"]["all three"] == [all_three] * 2
    assert result.measured["parameters"]["all three"] == pytest.approx(-0.647)
    assert result.measured["better than"]["constant rate"] == pytest.approx(all_three - 0.4)
