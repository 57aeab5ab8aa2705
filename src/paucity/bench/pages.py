"""One query against a long cache: the kernel that reads given pages against SDPA and a grouped product."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.decode import decode_attention
from ..measure.machine import least_seconds
from . import BenchRow, kernel_row

SHAPE = {"heads": 32, "group_heads": 8, "keys": 32768, "dim": 128}
PAGE = 32


def run() -> list[BenchRow]:
    """Every page, and 5 % of the pages drawn at random for each key-value head."""
    heads, group_heads, keys, dim = SHAPE.values()
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, 1, dim, generator=generator).bfloat16()
    key, value = (torch.randn(1, group_heads, keys, dim, generator=generator).bfloat16() for _ in range(2))
    pages = -(-keys // PAGE)
    some = torch.rand(1, group_heads, pages, generator=generator).topk(round(0.05 * pages)).indices.int()
    baselines = {
        "grouped bmm": partial(grouped, query, key, value),
        "SDPA": partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=True),
    }
    rows = []
    with torch.no_grad():
        for name, chosen in (("decode5", some), ("decode100", None)):
            count = keys if chosen is None else chosen.shape[-1] * PAGE
            rows.append(
                kernel_row(
                    f"attention.{name}.bf16",
                    f"B1 H{heads} HKV{group_heads} D{dim}, {keys} keys, pages of {PAGE}, {count / keys:.1%} read",
                    partial(decode_attention, query, key, value, chosen, page_size=PAGE),
                    baselines,
                    how="decode_attention, pages given" if chosen is not None else "decode_attention, every page",
                    least_seconds=least_seconds(
                        flops=4 * heads * count * dim, num_bytes=4 * group_heads * count * dim, dtype=torch.bfloat16
                    ),
                )
            )
    return rows


def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense decoding as batched products, the query heads of a group together: ``[B, H, 1, Dv]``."""
    batch, heads, _, dim = query.shape
    rows = query.view(batch, key.shape[1], -1, dim)
    prob = (rows @ key.mT / math.sqrt(dim)).softmax(-1)
    return (prob @ value).view(batch, heads, 1, -1)
