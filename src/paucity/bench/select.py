"""Selection of a few entries of long rows: ours against torch.topk."""

from functools import partial

import torch

from ..kernels.select import statistical_topk, topk
from ..measure.machine import least_seconds
from . import BenchRow, kernel_row

SHAPES = {"statistical": (4096, 16384, 819), "topk": (4096, 16384, 32), "topk_long": (1, 131072, 64)}


def run() -> list[BenchRow]:
    """Statistical top-k of 5 %, and exact top-k of few entries."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for name, (count, width, k) in SHAPES.items():
        x = torch.randn(count, width, generator=generator)
        ours = statistical_topk if name == "statistical" else topk
        rows.append(
            kernel_row(
                f"select.{name}",
                f"{count} rows of {width}, k={k}, fp32",
                partial(ours, x, k),
                {"torch.topk": partial(torch.topk, x, k)},
                how=ours.__name__,
                least_seconds=least_seconds(flops=0, num_bytes=x.nbytes + count * k * 8, dtype=torch.float32),
                repeats=7,
            )
        )
    return rows
