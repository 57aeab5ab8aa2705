"""Which packed format stores a weight in the fewest bytes, exactly."""

import torch
from torch import Tensor

from ...checks import check_floating, check_ndim
from .block_rows import PackedBlocks
from .packed import PackedBitmask, PackedNM

_BLOCKS = ((4, 16), (8, 16), (16, 16), (32, 32), (64, 64))
_GROUPS = (2, 4, 8, 16)


def nm_pattern(weight: Tensor) -> tuple[int, int] | None:
    """``(n, m)`` that stores least of the N:M patterns (m up to 16) that the zeros of ``weight`` obey.

    Args:
        weight: ``[rows, cols]``.

    Returns:
        None where no pattern would leave anything out.
    """
    check_ndim("nm_pattern", "weight", weight, 2)
    found = []
    for m in _GROUPS:
        if weight.numel() and weight.shape[1] % m == 0:
            kept = (weight != 0).reshape(-1, m).view(torch.uint8)
            n = max(1, int(kept.sum(-1, dtype=torch.uint8).max()))
            found.append((n / m, m, n))
    share, m, n = min(found, default=(1.0, 0, 0))
    return (n, m) if share < 1 else None


def smallest(weight: Tensor) -> PackedNM | PackedBitmask | PackedBlocks:
    """``weight`` in the exact format that takes the fewest bytes, which are what decoding reads.

    N:M goes before blocks (4x16, 8x16, 16x16, 32x32, 64x64) and these before the bitmask where they take as many.

    Args:
        weight: ``[rows, cols]``, any float dtype.

    Raises:
        InputError: if ``weight`` is no floating-point matrix.
    """
    check_floating("smallest", "weight", weight)
    check_ndim("smallest", "weight", weight, 2)
    (rows, cols), size = weight.shape, weight.element_size()
    kept = weight != 0
    bits = rows * -(-cols // 8)
    pattern = nm_pattern(weight)
    options: list[tuple[int, int, tuple[int, int]]] = []  # bytes, rank, pattern or block
    if pattern is not None:
        options.append((rows * cols // pattern[1] * pattern[0] * size + bits, 0, pattern))
    for br, bc in _BLOCKS:
        if rows % br == 0 and cols % bc == 0:
            count = int(kept.view(rows // br, br, cols // bc, bc).any(3).any(1).sum())
            options.append((count * (br * bc * size + 4) + 4 * (rows // br + 1), 1, (br, bc)))
    wide = 4 if weight.numel() <= torch.iinfo(torch.int32).max else 8
    options.append((int(kept.sum()) * size + bits + wide * (rows + 1), 2, (0, 0)))
    _, rank, sizes = min(options)
    if rank == 0:
        return PackedNM.pack(weight, *sizes)
    return PackedBlocks.pack(weight, sizes) if rank == 1 else PackedBitmask.pack(weight)
