"""Linear layers at batch 1: half of the inputs, or weights that are packed, against F.linear."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.linear import input_major, packed_linear, sparse_input_linear
from ..measure.machine import least_seconds
from ..ops.formats import PackedBitmask, PackedGroups, PackedNM
from ..ops.select import block_topk_mask, nm_mask, topk_mask
from . import BenchRow, kernel_row

IN, OUT = 4096, 11008
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def run() -> list[BenchRow]:
    """Sparse input in both dtypes, the threshold applied in the kernel, and packed weights in bfloat16."""
    with torch.no_grad():
        return [*(_sparse_input(dtype) for dtype in SHORT), *_packed()]


def _made(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator).to(dtype)
    return torch.randn(1, IN, generator=generator).to(dtype), weight


def _sparse_input(dtype: torch.dtype) -> BenchRow:
    x, weight = _made(dtype)
    threshold = float(x.abs().median())
    kept = int((x.abs() > threshold).sum())
    return kernel_row(
        f"linear.input50.{SHORT[dtype]}",
        f"{IN}→{OUT}, batch 1, {kept / IN:.1%} of the inputs",
        partial(sparse_input_linear, x, input_major(weight), threshold=threshold),
        {"F.linear": partial(F.linear, x, weight)},
        how="sparse_input_linear, threshold applied inside",
        least_seconds=least_seconds(flops=2 * kept * OUT, num_bytes=kept * OUT * dtype.itemsize, dtype=dtype),
        repeats=25,
    )


def _packed() -> list[BenchRow]:
    x, weight = _made(torch.bfloat16)
    groups = block_topk_mask(weight.abs(), block=(1, 16), sparsity=0.5)
    variants: dict[str, PackedNM | PackedBitmask | PackedGroups] = {
        "nm24": PackedNM.pack(torch.where(nm_mask(weight.abs(), n=2, m=4), weight, 0), 2, 4),
        "bitmask50": PackedBitmask.pack(torch.where(topk_mask(weight.abs(), sparsity=0.5), weight, 0)),
        "groups50": PackedGroups.pack(torch.where(groups, weight, 0)),
    }
    return [
        kernel_row(
            f"linear.{name}.bf16",
            f"{IN}→{OUT}, batch 1, {packed!r}",
            partial(packed_linear, x, packed),
            {"F.linear": partial(F.linear, x, weight)},
            how="packed_linear",
            least_seconds=least_seconds(flops=IN * OUT, num_bytes=packed.nbytes, dtype=torch.bfloat16),
            repeats=25,
        )
        for name, packed in variants.items()
    ]
