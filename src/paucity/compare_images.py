"""Dense against sparse image classifiers: the same images for both, and what each cost."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .measure.cost import Timing, time_interleaved
from .measure.flops import flops
from .measure.images import Images, accuracy_of, calibration_error_of, logits_of
from .measure.memory import MEGABYTE, peak_memory_mb, weight_bytes
from .measure.stats import share_change
from .models.sites import find_sites
from .recipe_images import ImageData
from .report import BatchTime, ImageMeasurement
from .weights.sparse_conv import LayerChoice, fold_batchnorm, sparsify_convs

Progress = Callable[[str], None]


def densities(model: nn.Module, dense: nn.Module, kinds: Sequence[str] | None = None) -> dict[str, float]:
    """Nonzeros of each weight of ``kinds`` (see `paucity.models.sites`; None is all) that lost some, as a share.

    Of the weights that ``dense`` has there: ``model`` may be smaller.
    """
    names = [site.name for site in find_sites(model, kinds) if site.kind != "norm"]
    counts = {
        name: (int(model.get_parameter(name).count_nonzero()), dense.get_parameter(name).numel()) for name in names
    }
    return {name: left / size for name, (left, size) in counts.items() if left < size}


def measure_images(
    wanted: ImageData, dense: nn.Module, sparse: nn.Module, test: Images, tell: Progress
) -> dict[str, Any]:
    """Both models on the test images, and what they cost: BatchNorm folded, dense in its better layout of memory.

    Returns:
        ``{"dense", "sparse": fields of ImageMeasurement, "notes": sentences}``, as JSON.
    """
    tell("accuracy of both models")
    logits = {"dense": logits_of(dense, test), "sparse": logits_of(sparse, test)}
    right = {name: (each.argmax(-1) == test.labels).double().tolist() for name, each in logits.items()}
    change = share_change(right["sparse"], right["dense"])
    folded, fast, x = fold_batchnorm(dense), sparse, test.pixels[:1]
    times: dict[str, list[dict[str, Any]]] = {"dense": [], "sparse": []}
    notes = list[str]()
    for batch in wanted.batch_sizes:
        tell(f"{batch} images at a time, dense and sparse in turns")
        x = test.pixels[torch.arange(batch) % len(test)]
        fast, choices = sparsify_convs(fold_batchnorm(sparse), x, repeats=wanted.repeats)
        notes += _said(batch, choices)
        for name, timing in _timed(folded, fast, x, wanted.repeats).items():
            times[name].append(BatchTime(batch=batch, ms=timing.median, low=timing.min, high=timing.max).model_dump())
    result: dict[str, Any] = {"notes": notes}
    for name, model in (("dense", folded), ("sparse", fast)):
        share = accuracy_of(logits[name], test.labels)
        run = partial(_forward, model, x)
        given = dense if name == "dense" else sparse
        part = ImageMeasurement(
            accuracy=share.value,
            low=share.value if share.low is None else share.low,
            high=share.value if share.high is None else share.high,
            change_low=change.low if name == "sparse" else None,
            change_high=change.high if name == "sparse" else None,
            calibration_error=calibration_error_of(logits[name], test.labels),
            num_images=len(test),
            num_nonzero=sum(int((parameter != 0).sum()) for parameter in given.parameters()),
            weights_mb=weight_bytes(model) / MEGABYTE,
            peak_memory_mb=peak_memory_mb(run, model=model),
            flops=flops(run) / len(x),
            times=times[name],
        )
        result[name] = part.model_dump()
    return result


def _timed(dense: nn.Module, sparse: nn.Module, x: Tensor, repeats: int) -> dict[str, Timing]:
    """Milliseconds of both models; dense in the layout of memory that was faster."""
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    turned = x.contiguous(memory_format=torch.channels_last)
    variants = {"first": (dense, x), "last": (last, turned), "sparse": (sparse, x)}
    calls = {name: partial(_forward, model, given) for name, (model, given) in variants.items()}
    timings = time_interleaved(calls, repeats=repeats, warmup=3).scaled(1e3).timings
    return {"dense": min(timings["first"], timings["last"], key=lambda t: t.median), "sparse": timings["sparse"]}


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out


def _said(batch: int, choices: list[LayerChoice]) -> list[str]:
    """How many 1x1 convolutions run sparse, where some do not."""
    sparse = [choice for choice in choices if choice.sparse]
    if not choices or len(sparse) == len(choices):
        return []
    images = "one image" if batch == 1 else f"{batch} images"
    return [
        f"At {images}, {len(choices) - len(sparse)} of {len(choices)} 1x1 convolutions run dense, which was faster."
    ]
