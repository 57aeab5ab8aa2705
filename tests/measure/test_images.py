"""Reading of images, accuracy and calibration."""

import gzip
import struct

import numpy as np
import pytest
import torch
from torch import nn

from paucity.checks import InputError
from paucity.measure.images import (
    Images,
    accuracy,
    accuracy_of,
    calibration_error,
    calibration_error_of,
    digits,
    fashion_mnist,
    logits_of,
    read_images,
)


def write_idx(folder, count=20):
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        head = struct.pack(">iiii", 2051, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels.tobytes()))
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">ii", 2049, count) + labels.tobytes())
        )
    return pixels


def test_idx_files(tmp_path, monkeypatch):
    pixels = write_idx(tmp_path / "fashion_mnist")
    monkeypatch.setenv("PAUCITY_DATA", str(tmp_path))
    images = fashion_mnist("test")
    assert images.pixels.shape == (20, 1, 28, 28)
    assert images.name == "fashion_mnist test"
    torch.testing.assert_close(images.pixels[:, 0] * 0.3530 + 0.2860, torch.from_numpy(pixels) / 255)
    assert images.labels.tolist() == [i % 10 for i in range(20)]
    part = read_images("fashion_mnist", "train", limit=3, mean=(0.0,), std=(1.0,))
    assert part.pixels.shape == (3, 1, 28, 28)
    assert part.pixels.min() >= 0
    assert part.pixels.max() <= 1
    assert sorted(images.take(20, seed=1).labels.tolist()) == sorted(images.labels.tolist())
    assert not torch.equal(images.take(20, seed=1).labels, images.labels)
    assert [len(batch) for batch in images.batches(8)] == [8, 8, 4]


def test_digits():
    pytest.importorskip("sklearn")
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.num_classes == 10
    assert abs(train.pixels.mean()) < 0.01
    assert abs(train.pixels.std() - 1) < 0.01


def test_accuracy_and_calibration_by_loops():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 4, generator=generator)
    labels = torch.randint(4, (200,), generator=generator)
    images = Images(logits.view(200, 1, 1, 4), labels, "logits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(4))
        model[1].bias.zero_()
    model.train()
    torch.testing.assert_close(logits_of(model, images, batch_size=7), logits)
    assert model.training
    right = sum(int(row.argmax() == label) for row, label in zip(logits, labels, strict=True))
    assert accuracy(model, images).value == right / 200
    assert accuracy(model, images).low < right / 200 < accuracy(model, images).high

    error = 0.0
    for low in range(5):
        inside = [
            (float(row.softmax(-1).max()), float(row.argmax() == label))
            for row, label in zip(logits.double(), labels, strict=True)
            if low / 5 < row.softmax(-1).max() <= (low + 1) / 5
        ]
        if inside:
            confidence, hits = zip(*inside, strict=True)
            error += len(inside) / 200 * abs(sum(hits) / len(hits) - sum(confidence) / len(confidence))
    assert calibration_error(model, images, bins=5) == pytest.approx(error)


def test_certain_and_right_is_calibrated():
    labels = torch.arange(4)
    assert calibration_error_of(1000 * torch.eye(4), labels) == 0
    assert calibration_error_of(1000 * torch.eye(4), labels.roll(1)) == 1
    assert accuracy_of(torch.eye(4), labels).value == 1


def test_bad_input(tmp_path, monkeypatch):
    monkeypatch.setenv("PAUCITY_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"holds no fashion_mnist/.*public at https://github.com/zalando"):
        fashion_mnist("train")
    with pytest.raises(InputError, match=r"name must be one of .*, got mnits \(did you mean 'mnist'"):
        read_images("mnits", "train")
    with pytest.raises(InputError, match="split must be one of test, train, got valid"):
        read_images("mnist", "valid")
    with pytest.raises(InputError, match="labels must have shape"):
        Images(torch.ones(2, 1, 3, 3), torch.zeros(3, dtype=torch.int64), "x")
    with pytest.raises(InputError, match="at least one image"):
        Images(torch.ones(0, 1, 3, 3), torch.zeros(0, dtype=torch.int64), "x")
    images = Images(torch.ones(2, 1, 2, 2), torch.tensor([0, 9]), "x")
    with pytest.raises(InputError, match="know 10 classes, got 3"):
        accuracy(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), images)
