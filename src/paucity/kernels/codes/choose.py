"""The highest pre-activations of an encoder, at the speed of bfloat16 products and exact all the same.

All pre-activations are taken in bfloat16, where the machine multiplies those faster, and some more than asked for are
taken once more in float32. Rounding moves a product by at most ``2 u |x| |w|`` (Cauchy-Schwarz; ``u = 2^-8``): where
the last that is kept lies further than that above the last candidate, no other entry can belong to the kept ones. The
few rows of which this is not known are computed in float32 throughout.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from ..dispatch import requested
from ..select import topk
from . import op

_MORE = 64  # candidates beyond twice k
_SCRATCH = 2**25  # entries of the products that are held at once
_SLACK = 1.05  # on the bound: float32 sums and the squares of u
_UNIT = 2.0**-8


def choose(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, by_abs: bool) -> Tensor:
    """Indices ``[n, k]`` (int32) of the highest of ``x [n, d] @ weight.T + bias``, best first; no gradient flows."""
    size = max(1, _SCRATCH // max(1, len(weight)))
    wide = 2 * k + _MORE
    if not fast_halves(x) or 4 * wide > len(weight):
        return torch.cat([topk(F.linear(part, weight, bias), k, by_abs=by_abs)[1] for part in torch.split(x, size)])
    table = _widened(weight, bias)
    longest = table.norm(dim=1).max()
    halves = table.bfloat16()
    found = []
    for part in torch.split(x, size):
        rows = _widened(part, None if bias is None else x.new_ones(len(part)))
        rough, candidates = topk(_product(rows.bfloat16(), halves), wide, by_abs=by_abs)
        candidates = candidates.sort(dim=1).values  # of equal entries the lower position wins
        values, order = topk(op.gather_dot(part, candidates, weight, bias), k, by_abs=by_abs)
        best = candidates.gather(1, order.long())
        lowest = rough[:, -1].abs().float() if by_abs else rough[:, -1].float()
        moved = _SLACK * 2 * _UNIT * rows.norm(dim=1) * longest + _UNIT * lowest.abs()
        last = values[:, -1].abs() if by_abs else values[:, -1]
        unsure = (~(last >= lowest + moved)).nonzero().squeeze(1)
        if len(unsure):
            best[unsure] = topk(F.linear(part[unsure], weight, bias), k, by_abs=by_abs)[1]
        found.append(best)
    return torch.cat(found)


def fast_halves(x: Tensor) -> bool:
    """Whether products of bfloat16 beat those of ``x``'s dtype on its device."""
    if x.dtype != torch.float32 or requested() == "reference" or not len(x):
        return False
    return _cpu_has_halves() if x.device.type == "cpu" else x.is_cuda and torch.cuda.is_bf16_supported(False)


def _product(rows: Tensor, table: Tensor) -> Tensor:
    """``rows @ table.T`` in bfloat16 with sums in float32, which a GPU may be told to leave."""
    settings = torch.backends.cuda.matmul
    reduced = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        return F.linear(rows, table)
    finally:
        settings.allow_bf16_reduced_precision_reduction = reduced


@functools.cache
def _cpu_has_halves() -> bool:
    return "avx512bf16" in native.instruction_sets()


def _widened(table: Tensor, last: Tensor | None) -> Tensor:
    """``table`` with one more column, and zeros up to a width that products like."""
    if last is None:
        return table
    n, d = table.shape
    wide = table.new_zeros(n, -(-(d + 1) // 32) * 32)
    wide[:, :d], wide[:, d] = table, last
    return wide
