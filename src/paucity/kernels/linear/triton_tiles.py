"""Pieces of the Triton twins of the linears: tiles of the input, their product with tiles of a weight, results."""
# mypy: disable-error-code="import-untyped, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch


def token_tile(tokens: int) -> int:
    """Tokens in a tile: one, or what a matrix product takes at least (there are never more)."""
    return 1 if tokens == 1 else 16


def multiplies_wide(x: Tensor) -> bool:
    """Whether matrix products are in float32: the interpreter has no right one for bfloat16."""
    return x.dtype == torch.bfloat16 and dispatch.interprets_triton()


@triton.jit
def load_x(
    x: tl.tensor, column: tl.tensor, inside: tl.tensor, tokens: tl.tensor, columns: tl.tensor, TOKENS: tl.constexpr
) -> tl.tensor:
    """``x[:, column]`` as ``[TOKENS, len(column)]``, 0 where not ``inside``."""
    token = tl.arange(0, TOKENS).to(tl.int64)
    return tl.load(
        x + token[:, None] * columns + column[None, :], mask=(token < tokens)[:, None] & inside[None, :], other=0.0
    )


@triton.jit
def multiply(total: tl.tensor, weight: tl.tensor, x: tl.tensor, TOKENS: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """``total`` plus the product of the tiles ``weight [rows, columns]`` and ``x [TOKENS, columns]``.

    One token is multiplied entry by entry into ``total [rows, columns]``, which is summed at the end; more make a
    matrix product, ``total [rows, TOKENS]``.
    """
    if TOKENS == 1:
        total += weight.to(tl.float32) * x.to(tl.float32)
    elif WIDE:
        total = tl.dot(weight.to(tl.float32), tl.trans(x.to(tl.float32)), total, input_precision="ieee")
    else:
        total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
    return total


@triton.jit
def finish(
    total: tl.tensor,
    out: tl.tensor,
    bias: tl.tensor,
    kept: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    TOKENS: tl.constexpr,
) -> None:
    """Write what `multiply` has summed, plus ``bias``, to rows ``row`` of ``out``; 0 where not ``kept`` (or None)."""
    token = tl.arange(0, TOKENS).to(tl.int64)
    if TOKENS == 1:
        total = tl.sum(total, 1)[:, None]
    if bias is not None:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = token[None, :] * rows + row[:, None]
    valid = inside[:, None] & (token < tokens)[None, :]
    if kept is not None:
        total = tl.where(tl.load(kept + at, mask=valid, other=0) != 0, total, 0.0)
    tl.store(out + at, total, mask=valid)
