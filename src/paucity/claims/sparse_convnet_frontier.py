"""Claim: large and sparse beats small and dense, for ConvNets of equal FLOPs and of equal measured time.

Papers: Elsen et al. 2019 (Fast Sparse ConvNets), https://arxiv.org/abs/1911.09723: sparse MobileNets beat dense ones of
equal FLOPs and of equal time on a telephone; Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878: large and sparse beats
small and dense at equal numbers of weights.
"""

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..measure.cost import time_interleaved
from ..measure.flops import flops
from ..measure.images import Images, logits_of
from ..measure.stats import share_change
from ..models.sites import find_sites
from ..models.vision import ConvNet
from ..training import train
from ..weights.gradual import magnitude_masks, train_sparse
from ..weights.sparse_conv import fold_batchnorm, sparsify_convs
from . import CLAIMS
from .base import ClaimResult
from .pictures import small_pictures

NAME = "sparse-convnet-frontier"
SPARSITY, LEARNING_RATE, BATCH_SIZE = 0.85, 0.05, 64
TIMED = 1
"""Images at a time where time is measured: one, as in the paper."""


def run(*, quick: bool, seed: int = 0, width: int | None = None) -> ClaimResult:
    """Train sparse and dense ConvNets on Fashion-MNIST (scikit-learn's digits where it is not there) and compare.

    Args:
        quick: narrower networks, fewer images and one seed.
        seed: of the first run; the others follow.
        width: of the large network.
    """
    started = time.monotonic()
    wide = width or (32 if quick else 48)
    seeds = list(range(seed, seed + (1 if quick else 3)))
    training, test = small_pictures(2500 if quick else 5000, 4000 if quick else 10000)
    epochs = 2 if quick else 4
    shape = {"in_channels": training.pixels.shape[1], "image_size": training.pixels.shape[-1]}
    x = test.pixels[:TIMED]
    torch.manual_seed(seed)
    sparse = ConvNet(width=wide, **shape)
    magnitude_masks(sparse, find_sites(sparse, "pointwise"), sparsity=SPARSITY).apply_(sparse)
    by_flops, work = _equal_flops(sparse, wide, shape, x)
    by_time, times = _equal_time(sparse, wide, shape, x, repeats=21 if quick else 61)

    hits: dict[str, list[list[float]]] = {"sparse": [], "equal FLOPs": [], "equal time": []}
    for draw in seeds:
        torch.manual_seed(draw)
        model = ConvNet(width=wide, **shape)
        train_sparse(
            model,
            training,
            sparsity=SPARSITY,
            epochs=epochs,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            seed=draw,
            shift=1,
        )
        hits["sparse"].append(_hits(model, test))
        for name, narrow in (("equal FLOPs", by_flops), ("equal time", by_time)):
            torch.manual_seed(draw)
            dense = ConvNet(width=narrow, **shape)
            train(
                dense,
                training,
                epochs=epochs,
                batch_size=BATCH_SIZE,
                learning_rate=LEARNING_RATE,
                seed=draw,
                shift=1,
            )
            hits[name].append(_hits(dense, test))
    changes = {name: _change(hits["sparse"], hits[name]) for name in ("equal FLOPs", "equal time")}
    holds = {name: change["low"] > 0 for name, change in changes.items()}
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"MobileNets and EfficientNets on a Snapdragon 835, speed of sparse over dense": "1.3 to 2.4"},
        measured={
            "accuracy by seed": {name: [sum(run) / len(run) for run in runs] for name, runs in hits.items()},
            "sparse minus dense": changes,
            "width of the dense network": {"equal FLOPs": by_flops, "equal time": by_time},
            "FLOPs of an image": work,
            "milliseconds of an image": times,
            "verdicts": holds,
        },
        holds=all(holds.values()),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "data": f"{training.name}, {len(training)} images, {len(test)} to test on",
            "width": wide,
            "sparsity of the 1x1 convolutions": SPARSITY,
            "epochs": epochs,
            "batch size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "images at a time, timed": TIMED,
            "threads": torch.get_num_threads(),
            "seeds": seeds,
            "verdict": "95 % interval of the change over the test images of all seeds lies above 0",
        },
    )


def _fast(model: nn.Module) -> nn.Module:
    """BatchNorm folded, zeros skipped wherever the kernel's limit on density allows."""
    return sparsify_convs(fold_batchnorm(model))[0]


def _equal_flops(sparse: nn.Module, wide: int, shape: dict[str, int], x: Tensor) -> tuple[int, dict[str, int]]:
    """The narrowest dense network that executes at least the FLOPs of the sparse one: the benefit of the doubt."""
    fast = _fast(sparse)
    wanted = flops(partial(_forward, fast, x))
    for width in range(1, wide + 1):
        work = flops(partial(_forward, fold_batchnorm(ConvNet(width=width, **shape)), x))
        if work >= wanted:
            break
    return width, {"sparse": wanted, "dense": work}


def _equal_time(
    sparse: nn.Module, wide: int, shape: dict[str, int], x: Tensor, *, repeats: int
) -> tuple[int, dict[str, float]]:
    """The narrowest dense network, in its faster layout of memory, that takes at least the time of the sparse one."""
    variants = {"sparse": partial(_forward, _fast(sparse), x)}
    turned = x.contiguous(memory_format=torch.channels_last)
    widths = sorted({*range(4, wide, max(2, wide // 16)), wide})
    for width in widths:
        dense = fold_batchnorm(ConvNet(width=width, **shape))
        last = fold_batchnorm(dense).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        variants |= {f"{width} first": partial(_forward, dense, x), f"{width} last": partial(_forward, last, turned)}
    timings = time_interleaved(variants, repeats=repeats, warmup=3).scaled(1e3).timings
    medians = {w: min(timings[f"{w} {layout}"].median for layout in ("first", "last")) for w in widths}
    ours = timings["sparse"].median
    chosen = next((width for width in widths if medians[width] >= ours), wide)
    return chosen, {"sparse": ours, "dense, equal time": medians[chosen], "dense, same width": medians[wide]}


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out


def _hits(model: nn.Module, test: Images) -> list[float]:
    return [float(hit) for hit in logits_of(model, test).argmax(-1) == test.labels]


def _change(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Change of accuracy over the images of all seeds, with its 95 % interval."""
    change = share_change([hit for run in ours for hit in run], [hit for run in theirs for hit in run])
    assert change.low is not None
    assert change.high is not None
    return {"change": change.value, "low": change.low, "high": change.high}
