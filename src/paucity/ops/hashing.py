"""Hashing of vectors by random hyperplanes, and the Gray order of the buckets.

Vectors with a small angle fall on the same side of most hyperplanes. In Gray order neighbouring buckets differ in one
hyperplane, so that vectors sorted by it have near ones around them beyond the ends of their bucket too.
"""

import torch
from torch import Tensor

from ..checks import InputTypeError, check_floating, check_int, check_ndim, check_shape, check_tensor, fail

MAX_BITS = 62


def random_hyperplanes(
    dim: int, num_planes: int, *, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Normals of hyperplanes through the origin, in directions drawn uniformly: float32 ``[dim, num_planes]``.

    Args:
        dim: of the space.
        num_planes: how many, at most 62.
        generator: on the CPU, whatever ``device`` is, so that all devices draw the same.
        device: where the result lives.

    Raises:
        InputError: if a size is less than 1, or there are more planes than bits.
    """
    check_int("random_hyperplanes", "dim", dim)
    check_int("random_hyperplanes", "num_planes", num_planes, 1, MAX_BITS)
    return torch.randn(dim, num_planes, generator=generator).to(device)


def hyperplane_codes(x: Tensor, planes: Tensor) -> Tensor:
    """On which side of each hyperplane a vector lies: bit ``i`` is set where its product with plane ``i`` is positive.

    Args:
        x: ``[..., dim]`` float; no gradient flows through it.
        planes: ``[dim, num_planes]`` float, as `random_hyperplanes` gives them.

    Returns:
        ``[...]`` int64 in ``[0, 2 ** num_planes)``.

    Raises:
        InputError: if shapes do not fit each other or there are more planes than bits.
    """
    check_floating("hyperplane_codes", "x", x)
    check_ndim("hyperplane_codes", "planes", planes, 2)
    check_int("hyperplane_codes", "num_planes", planes.shape[1], 1, MAX_BITS)
    if not x.ndim:
        raise fail("hyperplane_codes", "x", "have at least 1 dimension", "a scalar")
    check_shape("hyperplane_codes", "planes", planes, x.shape[-1], None)
    wide = torch.promote_types(x.dtype, torch.float32)
    above = x.detach().to(wide) @ planes.to(wide) > 0
    return (above << torch.arange(planes.shape[1], device=x.device)).sum(-1)


def gray_rank(codes: Tensor) -> Tensor:
    """Where each code stands in the reflected Gray sequence, in which neighbours differ in one bit.

    Args:
        codes: any shape, integers of at least 0.

    Returns:
        The shape and dtype of ``codes``; code ``r ^ (r >> 1)`` has rank ``r``.

    Raises:
        InputError: if ``codes`` is not of an integer dtype.

    Examples:
        >>> gray_rank(torch.tensor([0, 1, 3, 2, 6, 7, 5, 4]))
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    check_tensor("gray_rank", "codes", codes)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise InputTypeError(f"gray_rank: codes must be integers, got {codes.dtype}.")
    rank = codes
    for shift in (1, 2, 4, 8, 16, 32):
        if shift >= 8 * codes.element_size():
            break
        rank = rank ^ (rank >> shift)
    return rank
