"""Whole ConvNets with sparse 1x1 convolutions against dense ones, BatchNorm folded in both."""

from functools import partial

import torch
from torch import Tensor, nn

from ..measure.cost import time_interleaved
from ..measure.flops import flops
from ..models.sites import find_sites
from ..models.vision import ConvNet
from ..weights.gradual import magnitude_masks
from ..weights.sparse_conv import fold_batchnorm, sparsify_convs
from . import BenchRow

WIDTH, IMAGE_SIZE, BATCHES = 64, 32, (1, 16, 64)


def run() -> list[BenchRow]:
    """90 % and 80 % sparse, one image and several at a time; dense in its faster layout of memory."""
    return [_row(name, sparsity, batch) for name, sparsity in (("90", 0.9), ("80", 0.8)) for batch in BATCHES]


def _row(name: str, sparsity: float, batch: int) -> BenchRow:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ConvNet(in_channels=3, width=WIDTH, image_size=IMAGE_SIZE).eval()
    magnitude_masks(model, find_sites(model, "pointwise"), sparsity=sparsity).apply_(model)
    dense = fold_batchnorm(model)
    last = fold_batchnorm(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fast, choices = sparsify_convs(dense, x)
    turned = x.contiguous(memory_format=torch.channels_last)
    variants = {"channels first": (dense, x), "channels last": (last, turned), "ours": (fast, x)}
    calls = {key: partial(_forward, each, given) for key, (each, given) in variants.items()}
    timings = time_interleaved(calls, repeats=25, warmup=3).timings
    fastest = min(("channels first", "channels last"), key=lambda key: timings[key].median)
    work, left = flops(calls["channels first"]), flops(partial(_forward, sparsify_convs(dense)[0], x))
    num_sparse = sum(choice.sparse for choice in choices)
    return BenchRow(
        f"convnet.sparse{name}",
        f"{sparsity:.0%} of the 1x1 weights, width {WIDTH}, {batch} of {IMAGE_SIZE}×{IMAGE_SIZE}, fp32",
        f"{num_sparse} of {len(choices)} 1x1 convolutions sparse",
        fastest,
        timings["ours"].median,
        timings[fastest].median,
        work / left,
    )


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out
