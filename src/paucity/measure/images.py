"""Labelled images: reading the sets, and how well a classifier does on them."""

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import InputError, check_choice, check_floating, check_int, check_ndim, check_shape, fail
from .data import data_file
from .stats import Estimate, share_interval
from .tokens import device_of, evaluating

SPLITS = ("train", "test")
_IDX_OFFSETS = {"images": 16, "labels": 8}


@dataclass(frozen=True, eq=False)
class Images:
    """Images with their classes.

    Attributes:
        pixels: float ``[N, C, H, W]``, normalised as the model is to see them.
        labels: int64 ``[N]``, classes from 0.
        name: of the set, with its split.
    """

    pixels: Tensor
    labels: Tensor
    name: str

    def __post_init__(self) -> None:
        """Raise InputError unless pixels and labels fit together."""
        check_ndim("Images", "pixels", self.pixels, 4)
        check_floating("Images", "pixels", self.pixels)
        if not len(self.pixels):
            raise fail("Images", "pixels", "hold at least one image", "none")
        check_shape("Images", "labels", self.labels, len(self.pixels))
        if self.labels.dtype != torch.int64 or bool((self.labels < 0).any()):
            raise fail("Images", "labels", "be int64 from 0", self.labels.dtype)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """One more than the highest label."""
        return int(self.labels.max()) + 1

    def take(self, count: int, *, seed: int | None = None) -> "Images":
        """The first ``count`` images, or as many drawn by ``seed`` without replacement."""
        check_int("Images.take", "count", count, 1, len(self))
        if seed is None:
            return Images(self.pixels[:count], self.labels[:count], self.name)
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return Images(self.pixels[drawn], self.labels[drawn], self.name)

    def batches(self, batch_size: int = 500) -> list[Tensor]:
        """The pixels in batches ``[B, C, H, W]``, in order: calibration for the methods that need activations."""
        check_int("Images.batches", "batch_size", batch_size)
        return list(torch.split(self.pixels, batch_size))


def fashion_mnist(split: str) -> Images:
    """Fashion-MNIST, 60,000 or 10,000 images ``[1, 28, 28]``. Needs ``PAUCITY_DATA/fashion_mnist``.

    Raises:
        FileNotFoundError: if it is not there; the error names its public address.
    """
    return read_images("fashion_mnist", split)


def digits(split: str) -> Images:
    """Scikit-learn's 1,797 handwritten digits ``[1, 8, 8]``; every fifth is in the test split.

    Raises:
        InputError: if scikit-learn is not installed.
    """
    return read_images("digits", split)


def read_images(
    name: str,
    split: str,
    *,
    limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Images:
    """A split of a set of images, of 10 classes each.

    Args:
        name: ``fashion_mnist``, ``mnist``, ``cifar10`` (its first 5,000 training and 1,000 test images) or ``digits``.
        split: ``train`` or ``test``.
        limit: take the first images only; None takes all.
        mean: of each channel in [0, 1], to normalise with; those of the set's training split if not given.
        std: as ``mean``.

    Raises:
        FileNotFoundError: if ``PAUCITY_DATA`` does not hold the set; the error names its public address.
        InputError: if a name is unknown, or there are fewer images than ``limit``.
    """
    check_choice("read_images", "name", name, SETS)
    check_choice("read_images", "split", split, SPLITS)
    read, own_mean, own_std = SETS[name]
    raw, labels = read(split)
    if limit is not None:
        check_int("read_images", "limit", limit, 1, len(raw))
        raw, labels = raw[:limit], labels[:limit]
    middle, spread = own_mean if mean is None else mean, own_std if std is None else std
    for argument, values in (("mean", middle), ("std", spread)):
        if len(values) != raw.shape[1]:
            raise fail("read_images", argument, f"have {raw.shape[1]} channels", len(values))
    pixels = torch.from_numpy(raw).float().div_(255)
    pixels.sub_(torch.tensor(middle).view(-1, 1, 1)).div_(torch.tensor(spread).view(-1, 1, 1))
    return Images(pixels, torch.from_numpy(labels).long(), f"{name} {split}")


def logits_of(model: nn.Module, images: Images, *, batch_size: int = 500) -> Tensor:
    """What the model says of each image: float32 ``[N, num_classes]`` on the CPU, in eval mode, without gradients.

    Raises:
        InputError: if the model gives anything but one row of logits an image, for every class of ``images``.
    """
    check_int("logits_of", "batch_size", batch_size)
    device, found = device_of(model), []
    with evaluating(model):
        for batch in images.batches(batch_size):
            logits = model(batch.to(device))
            check_shape("logits_of", "output of the model", logits, len(batch), None)
            found.append(logits.float().cpu())
    logits = torch.cat(found)
    if logits.shape[1] < images.num_classes:
        raise fail("logits_of", "model", f"know {images.num_classes} classes", logits.shape[1])
    return logits


def accuracy(model: nn.Module, images: Images, batch_size: int = 500) -> Estimate:
    """Share of the images whose class has the highest logit, with its 95 % interval (Wilson)."""
    return accuracy_of(logits_of(model, images, batch_size=batch_size), images.labels)


def accuracy_of(logits: Tensor, labels: Tensor) -> Estimate:
    """As `accuracy`, from logits ``[N, num_classes]`` that were computed before."""
    check_shape("accuracy_of", "labels", labels, len(logits))
    return share_interval((logits.argmax(-1) == labels.to(logits.device)).double().tolist())


def calibration_error(model: nn.Module, images: Images, bins: int = 15) -> float:
    """Expected calibration error: by how much confidence and accuracy differ, over bins of equal width in confidence.

    ``sum_b |B_b| / N |accuracy(B_b) - mean confidence(B_b)|``, in [0, 1]. Paper: Guo et al. 2017,
    https://arxiv.org/abs/1706.04599, Eq. 3.
    """
    return calibration_error_of(logits_of(model, images), images.labels, bins=bins)


def calibration_error_of(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """As `calibration_error`, from logits ``[N, num_classes]`` that were computed before."""
    check_ndim("calibration_error_of", "logits", logits, 2)
    check_shape("calibration_error_of", "labels", labels, len(logits))
    check_int("calibration_error_of", "bins", bins)
    confidence, guess = logits.double().softmax(-1).max(-1)
    right = (guess == labels.to(logits.device)).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # a bin holds its upper end, as in the paper
    gaps = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, place, right - confidence)
    return float(gaps.abs().sum() / len(labels))


def _read_idx(folder: str, address: str) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        prefix, parts = "train" if split == "train" else "t10k", []
        for kind, offset in _IDX_OFFSETS.items():
            path = data_file(f"{folder}/{prefix}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz", address=address)
            parts.append(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset))
        return parts[0].reshape(-1, 1, 28, 28).copy(), parts[1].copy()

    return read


def _read_cifar10(split: str) -> tuple[np.ndarray, np.ndarray]:
    path = data_file("cifar10_subset/cifar10_5k_1k.npz", address="https://www.cs.toronto.edu/~kriz/cifar.html")
    with np.load(path, allow_pickle=False) as data:
        return np.ascontiguousarray(data[f"x_{split}"].transpose(0, 3, 1, 2)), np.array(data[f"y_{split}"])


def _read_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "read_images: digits must have scikit-learn installed (pip install 'paucity[images]')."
        ) from None
    found = load_digits()
    chosen = (np.arange(len(found.target)) % 5 == 0) == (split == "test")
    raw = np.round(found.images[chosen][:, None] * (255 / 16)).astype(np.uint8)
    return raw, found.target[chosen].astype(np.int64)


_Read = Callable[[str], tuple[np.ndarray, np.ndarray]]
SETS: dict[str, tuple[_Read, tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": (_read_cifar10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "digits": (_read_digits, (0.3053,), (0.3760,)),
    "fashion_mnist": (
        _read_idx("fashion_mnist", "https://github.com/zalandoresearch/fashion-mnist"),
        (0.2860,),
        (0.3530,),
    ),
    "mnist": (_read_idx("mnist", "https://yann.lecun.com/exdb/mnist"), (0.1307,), (0.3081,)),
}
"""How each set is read (uint8 pixels and labels of a split), and the mean and deviation of its training channels."""
