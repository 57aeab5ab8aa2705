"""From masks to the positions of what is kept, and back."""

import torch
from torch import Tensor

from ..checks import InputTypeError, check_bool, check_int, check_tensor, fail


def mask_to_indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the kept entries along the last dimension, and how many there are.

    Returns:
        ``indices`` ``[..., max count]`` int64, ascending, padded with -1; ``counts`` ``[...]`` int64.
    """
    check_bool("mask_to_indices", "mask", mask)
    _check_row("mask_to_indices", "mask", mask)
    counts = mask.sum(-1)
    width = int(counts.max()) if counts.numel() else 0
    row, position = mask.reshape(counts.numel(), mask.shape[-1]).nonzero(as_tuple=True)
    first = counts.flatten().cumsum(0) - counts.flatten()
    indices = torch.full((counts.numel(), width), -1, device=mask.device)
    indices[row, torch.arange(len(row), device=mask.device) - first[row]] = position
    return indices.view(*counts.shape, width), counts


def indices_to_mask(indices: Tensor, size: int) -> Tensor:
    """Mask ``[..., size]`` that is True at ``indices`` ``[..., k]`` (any order, repeats allowed, -1 is padding).

    Raises:
        InputError: if an index is outside [-1, size).
    """
    check_tensor("indices_to_mask", "indices", indices)
    check_int("indices_to_mask", "size", size, 0)
    _check_row("indices_to_mask", "indices", indices)
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise InputTypeError(f"indices_to_mask: indices must be integers, got {indices.dtype}.")
    for end in (indices.min(), indices.max()) if indices.numel() else ():
        check_int("indices_to_mask", "every index", int(end), -1, size - 1)
    padded = torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool, device=indices.device)
    return padded.scatter_(-1, indices.long() % (size + 1), True)[..., :size].contiguous()


def _check_row(function: str, argument: str, tensor: Tensor) -> None:
    if not tensor.ndim:
        raise fail(function, argument, "have at least 1 dimension", "a scalar")
