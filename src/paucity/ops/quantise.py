"""Numbers in 8 or 4 bits, by the least and the greatest of a group."""

import torch
from torch import Tensor

from ..checks import check_divides, check_floating, fail


def quantise(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` as ``low + step * code``, with a ``low`` and a ``step`` for all that differs in ``dim`` alone.

    Args:
        x: float, of any shape.
        dim: of the group; nothing is packed along it.
        bits: 8, or 4: then two neighbours of the last dimension share a byte.

    Returns:
        Codes, uint8, with half the last dimension at 4 bits; ``low`` and ``step`` in the dtype of ``x``, of length 1 in
        ``dim``. The error is at most half a step, and what rounding ``low`` and ``step`` to the dtype of ``x`` costs.

    Raises:
        InputError: if ``bits`` is neither 4 nor 8, or the last dimension is odd at 4 bits.
    """
    check_floating("quantise", "x", x)
    if bits not in (4, 8):
        raise fail("quantise", "bits", "be 4 or 8", bits)
    check_divides("quantise", "8 // bits", 8 // bits, x.shape[-1], "the last dimension")
    levels = 2**bits - 1
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    low = wide.amin(dim, keepdim=True).to(x.dtype)
    step = ((wide.amax(dim, keepdim=True) - low) / levels).to(x.dtype)
    # Rounded as they are kept, so that the codes make up for it.
    codes = ((wide - low) / step.masked_fill(step == 0, 1).to(wide.dtype)).round().clamp(0, levels).to(torch.uint8)
    return (codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4), low, step


def dequantise(codes: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    """What `quantise` took apart, in the dtype of ``low``."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return torch.addcmul(low, codes.to(low.dtype), step)
