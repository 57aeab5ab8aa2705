"""The part of a report that is about image classifiers: its schema, its rows and its verdict."""

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from . import units

ACCURACY_LIMIT = 0.01
"""The loss of accuracy up to which the verdict says that quality is kept."""
_RESOLUTION = 0.03


class BatchTime(BaseModel):
    """Median time of one forward pass over ``batch`` images in ms, and its fastest and slowest round."""

    model_config = ConfigDict(extra="forbid")

    batch: int
    ms: float
    low: float
    high: float


class ImageMeasurement(BaseModel):
    """What was measured on one image classifier.

    ``change_low`` and ``change_high`` are the 95 % interval of the accuracy's change from dense, on the same images;
    ``flops`` are those of one image as executed; memory is in MB of 10^6 bytes.
    """

    model_config = ConfigDict(extra="forbid")

    accuracy: float
    low: float
    high: float
    change_low: float | None = None
    change_high: float | None = None
    calibration_error: float
    num_images: int
    num_nonzero: int
    weights_mb: float
    peak_memory_mb: float
    flops: float
    times: list[BatchTime]


@dataclass(frozen=True)
class ImageRow:
    """A quantity of both models; ``points`` are differences in percent of the whole."""

    label: str
    dense: float
    sparse: float
    show: Callable[[float | None], str]
    more_is_better: bool = False
    points: bool = False
    noise: bool = False


def image_rows(dense: ImageMeasurement | None, sparse: ImageMeasurement | None) -> list[ImageRow]:
    """What the page and the console show; nothing where one of the two was not measured."""
    if dense is None or sparse is None:
        return []
    images = f"Accuracy, {units.count(sparse.num_images)} images"
    rows = [
        ImageRow(images, dense.accuracy, sparse.accuracy, units.percent, True, True, _same_accuracy(sparse)),
        ImageRow("Calibration error", dense.calibration_error, sparse.calibration_error, units.percent, False, True),
    ]
    for was, now in zip(dense.times, sparse.times, strict=True):
        label = "One image" if now.batch == 1 else f"{units.count(now.batch)} images at once"
        rows.append(ImageRow(label, was.ms, now.ms, units.ms, noise=_same_time(was, now)))
    for label, name, show in (
        ("Work of an image", "flops", units.flop),
        ("Weights not zero", "num_nonzero", lambda value: units.scaled(value, "")),
        ("Weights in memory", "weights_mb", units.megabytes),
        (f"Peak memory, {units.count(sparse.times[-1].batch)} images", "peak_memory_mb", units.megabytes),
    ):
        rows.append(ImageRow(label, getattr(dense, name), getattr(sparse, name), show))
    return rows


def image_verdict(dense: ImageMeasurement, sparse: ImageMeasurement) -> list[str]:
    """What the figures say, one plain sentence each."""
    moved = sparse.accuracy - dense.accuracy
    kept = "keeps" if moved >= -ACCURACY_LIMIT else "does not keep"
    doubt = ", within the interval of the images" if _same_accuracy(sparse) else ""
    limit = f"{100 * ACCURACY_LIMIT:g} point of dense"
    said = [f"Sparse {kept} accuracy within {limit} ({units.change(moved, 'points')}{doubt})."]
    for was, now in zip(dense.times, sparse.times, strict=True):
        what = "One image" if now.batch == 1 else f"A batch of {units.count(now.batch)}"
        times = f"{units.fixed(was.ms / now.ms, 2)} times the speed of dense"
        if _same_time(was, now):
            said.append(f"{what} is not measurably faster or slower: {times}, within the noise.")
        else:
            said.append(f"{what} is {'faster' if now.ms < was.ms else 'not faster'}: {times}.")
    said.append(f"An image takes {units.percent(sparse.flops / dense.flops)} of the FLOPs of dense.")
    return said


def _same_accuracy(sparse: ImageMeasurement) -> bool:
    low, high = sparse.change_low, sparse.change_high
    return low is not None and high is not None and low <= 0 <= high


def _same_time(was: BatchTime, now: BatchTime) -> bool:
    inside = was.low <= now.ms <= was.high and now.low <= was.ms <= now.high
    return inside or abs(now.ms / was.ms - 1) < _RESOLUTION
