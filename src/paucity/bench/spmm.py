"""1x1 convolutions with unstructured sparse weights against conv2d."""

from functools import partial

import torch
import torch.nn.functional as F

from ..kernels.spmm import sparse_conv1x1
from ..measure.machine import least_seconds
from ..ops.formats import PackedCSR
from ..ops.select import topk_mask
from . import BenchRow, kernel_row

CHANNELS, SIZE = 256, 56


def run() -> list[BenchRow]:
    """90 % and 80 % sparse weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CHANNELS, CHANNELS, generator=generator)
    x = torch.randn(1, CHANNELS, SIZE, SIZE, generator=generator)
    rows = []
    for name, sparsity in (("conv1x1", 0.9), ("conv1x1_80", 0.8)):
        sparse = torch.where(topk_mask(weight.abs(), sparsity=sparsity), weight, 0)
        packed = PackedCSR.pack(sparse)
        flops, moved = 2 * packed.values.numel() * SIZE**2, 2 * x.nbytes + packed.nbytes
        with torch.no_grad():
            rows.append(
                kernel_row(
                    f"spmm.{name}",
                    f"{sparsity:.0%} sparse, {CHANNELS}→{CHANNELS}, {SIZE}×{SIZE}, fp32",
                    partial(sparse_conv1x1, x, packed),
                    {"conv2d": partial(F.conv2d, x, sparse[..., None, None])},
                    how="sparse_conv1x1",
                    least_seconds=least_seconds(flops=flops, num_bytes=moved, dtype=torch.float32),
                    repeats=25,
                )
            )
    return rows
