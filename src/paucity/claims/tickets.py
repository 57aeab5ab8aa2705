"""What the claims on lottery tickets share: LeNet-300-100, its training, and the images that it learns.

The net is that of the first experiments of Frankle & Carbin 2018, https://arxiv.org/abs/1803.03635.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..measure.images import Images, accuracy_of, calibration_error_of, logits_of, read_images
from ..training import num_steps, train
from ..weights.iterative import Phase, TrainFn

BATCH = 128
RATE = 0.05


@dataclass(frozen=True)
class Source:
    """Fashion-MNIST, or digits where it is not there.

    Attributes:
        name: of the set.
        shape: (C, H, W) of an image.
        trained: images to train on.
        tested: images to measure on.
        note: what the reader must know, empty where all is as planned.
    """

    name: str
    shape: tuple[int, int, int]
    trained: Images
    tested: Images
    note: str = ""


def source(num_train: int, num_test: int) -> Source:
    """At most so many images of Fashion-MNIST; without PAUCITY_DATA scikit-learn's digits, with a note that says so."""
    name, note = "fashion_mnist", ""
    try:
        trained, tested = (read_images(name, split) for split in ("train", "test"))
    except FileNotFoundError as error:
        name, note = "digits", f"measured on digits instead: {error}"
        trained, tested = (read_images(name, split) for split in ("train", "test"))
    trained, tested = trained.take(min(num_train, len(trained))), tested.take(min(num_test, len(tested)))
    channels, height, width = trained.pixels.shape[1:]
    return Source(name, (channels, height, width), trained, tested, note)


def net(images: Source, *, seed: int) -> nn.Sequential:
    """Two hidden layers of 300 and 100 neurons, of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(math.prod(images.shape), 300), nn.Linear(300, 100), nn.Linear(100, 10)]
    return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def trainer(images: Source, *, epochs: int, seed: int) -> TrainFn:
    """Trains as a phase asks for and records accuracy and calibration error on the test images."""

    def run(model: nn.Module, phase: Phase) -> dict[str, float]:
        train(
            model, images.trained, epochs=epochs, batch_size=BATCH, learning_rate=RATE, seed=seed, masks=phase.masks,
            start_step=phase.start, max_steps=phase.stop, schedule="constant" if phase.fine_tune else "cosine",
        )  # fmt: skip
        return scores(model, images.tested)

    return run


def an_epoch(images: Source) -> int:
    """Steps of one epoch."""
    return num_steps(len(images.trained), 1, BATCH)


def scores(model: nn.Module, images: Images) -> dict[str, float]:
    """Accuracy and expected calibration error of 15 bins."""
    logits = logits_of(model, images)
    found = calibration_error_of(logits, images.labels)
    return {"accuracy": accuracy_of(logits, images.labels).value, "calibration_error": found}
