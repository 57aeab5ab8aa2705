"""Tetrolets: Haar wavelets on the tiling by tetrominoes that fits a block of pixels best.

Paper: Dash et al. 2020, https://arxiv.org/abs/2004.01551, Section II, after Krommweh 2010 (Tetrolet Transform). A block
of 4 by 4 pixels can be covered by four tetrominoes in 117 ways. The four pixels of each piece go through the Haar
transform of length 4, which gives one low coefficient and three high ones; the way whose high coefficients have the
smallest l1 norm is taken. The low coefficients make an image of half the size, to be transformed again. Every way is
orthonormal, so reconstruction is exact.

As a dictionary the atoms are the ``117 * 16`` basis vectors of all ways, and a code has 16 entries, those of its way.
"""

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..checks import check_divides, check_floating, check_range, check_shape, fail
from ..ops.formats import Codes
from .base import Dictionary

SIDE, PIXELS, PIECES = 4, 16, 4
_SQUARES = ((0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15))


class Tetrolets(Dictionary):
    """The dictionary of all tilings of a block, for rows of 16 pixels (4 by 4, row after row); nothing is learned.

    Args:
        threshold: high coefficients of at most this size become 0.
    """

    _atoms: Tensor

    def __init__(self, *, threshold: float = 0.0) -> None:
        super().__init__(PIXELS, len(tilings()) * PIXELS)
        check_range("Tetrolets", "threshold", threshold, 0)
        self.threshold = threshold
        self.register_buffer("_atoms", bases().reshape(-1, PIXELS).float())

    @property
    def atoms(self) -> Tensor:
        """``[117 * 16, 16]``: for each tiling the four low atoms, then three high ones of each piece."""
        return self._atoms

    def encode(self, x: Tensor) -> Codes:
        """See `Dictionary.encode`."""
        self.check_input(x)
        values, tiling = best_tiling(x.to(self._atoms.dtype))
        kept = (values.abs() > self.threshold) | (torch.arange(PIXELS, device=x.device) < PIECES)
        indices = tiling.unsqueeze(-1) * PIXELS + torch.arange(PIXELS, device=x.device)
        return Codes(values * kept, indices, self.dict_size)

    def fit(self, activations: Any, **options: Any) -> None:
        """Nothing: the atoms do not depend on data."""

    def rescale(self, factor: float) -> None:
        """The threshold has the unit of the pixels."""
        self.threshold *= factor

    def settings(self) -> dict[str, Any]:
        """See `Dictionary.settings`."""
        return {"threshold": self.threshold}


def tetrolet_transform(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One level of the transform.

    Args:
        images: ``[..., H, W]``, float, sides that 4 divides.

    Returns:
        low ``[..., H / 2, W / 2]``, high ``[..., H / 4, W / 4, 4, 3]`` and tilings ``[..., H / 4, W / 4]`` (int64).

    Raises:
        InputError: if a side is no multiple of 4.
    """
    check_floating("tetrolet_transform", "images", images)
    if images.ndim < 2:
        raise fail("tetrolet_transform", "images", "have at least 2 dimensions", f"shape {list(images.shape)}")
    for size in images.shape[-2:]:
        check_divides("tetrolet_transform", "4", SIDE, size, "a side")
    height, width = images.shape[-2:]
    lead, down, across = images.shape[:-2], height // SIDE, width // SIDE
    blocks = images.reshape(*lead, down, SIDE, across, SIDE).transpose(-3, -2)
    values, tiling = best_tiling(blocks.flatten(-2))
    low = values[..., :PIECES].reshape(*lead, down, across, 2, 2).transpose(-3, -2)
    return low.reshape(*lead, height // 2, width // 2), values[..., PIECES:].reshape(*tiling.shape, PIECES, 3), tiling


def inverse_tetrolet_transform(low: Tensor, high: Tensor, tiling: Tensor) -> Tensor:
    """The images ``[..., H, W]`` of which `tetrolet_transform` made these."""
    check_shape(
        "inverse_tetrolet_transform", "low", low, *tiling.shape[:-2], 2 * tiling.shape[-2], 2 * tiling.shape[-1]
    )
    check_shape("inverse_tetrolet_transform", "high", high, *tiling.shape, PIECES, 3)
    lead, (down, across) = tiling.shape[:-2], tiling.shape[-2:]
    corners = low.reshape(*lead, down, 2, across, 2).transpose(-3, -2).flatten(-2)
    values = torch.cat([corners, high.flatten(-2)], -1)
    blocks = (values.unsqueeze(-2) @ bases().to(values)[tiling]).squeeze(-2)
    images = blocks.reshape(*lead, down, across, SIDE, SIDE).transpose(-3, -2)
    return images.reshape(*lead, down * SIDE, across * SIDE)


def best_tiling(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients ``[..., 16]`` (four low, then three high a piece) and the tiling ``[...]`` of ``blocks [..., 16]``.

    Of tilings with equal l1 norms of their high coefficients (to rounding) the first is taken.
    """
    rows, table = blocks.reshape(-1, PIXELS), bases().to(blocks)
    found, chosen = [], []
    for part in torch.split(rows, 4096):
        every = torch.einsum("np,tcp->ntc", part, table)
        cost = every[..., PIECES:].abs().sum(-1)
        slack = cost.amin(1, keepdim=True) + 16 * torch.finfo(cost.dtype).eps * part.abs().sum(1, keepdim=True)
        best = (cost <= slack).int().argmax(1)
        chosen.append(best)
        found.append(every[torch.arange(len(part), device=part.device), best])
    if not found:
        return blocks.new_zeros(blocks.shape), torch.zeros(blocks.shape[:-1], dtype=torch.int64, device=blocks.device)
    return torch.cat(found).view(blocks.shape), torch.cat(chosen).view(blocks.shape[:-1])


@cache
def tilings() -> tuple[tuple[tuple[int, ...], ...], ...]:
    """All 117 ways to cover 4 by 4 pixels with four tetrominoes, the four squares first.

    A piece is its pixels in ascending order. The pieces stand in the order that overlaps the four squares most, so that
    their low coefficients make an image.
    """
    ways: set[frozenset[tuple[int, ...]]] = set()

    def cover(left: frozenset[int], pieces: tuple[tuple[int, ...], ...]) -> None:
        if not left:
            ways.add(frozenset(pieces))
            return
        for piece in _pieces_at(min(left)):
            if set(piece) <= left:
                cover(left - set(piece), (*pieces, piece))

    cover(frozenset(range(PIXELS)), ())

    def ordered(way: frozenset[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        orders = itertools.permutations(sorted(way))
        return max(orders, key=lambda order: sum(len(set(a) & set(b)) for a, b in zip(order, _SQUARES, strict=True)))

    return tuple(sorted((ordered(way) for way in ways), key=lambda way: (way != _SQUARES, way)))


@cache
def bases() -> Tensor:
    """``[117, 16, 16]`` float64: orthonormal rows of each tiling, four low ones, then three high ones a piece."""
    haar = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
    out = torch.zeros(len(tilings()), PIXELS, PIXELS, dtype=torch.float64)
    for number, way in enumerate(tilings()):
        for place, piece in enumerate(way):
            out[number, place, list(piece)] = haar[0]
            for row in range(3):
                out[number, PIECES + 3 * place + row, list(piece)] = haar[row + 1]
    return out


@cache
def _pieces_at(pixel: int) -> tuple[tuple[int, ...], ...]:
    """The tetrominoes whose first pixel (in ascending order) is ``pixel``."""
    found: set[tuple[int, ...]] = {(pixel,)}
    for _ in range(3):
        grown: set[tuple[int, ...]] = set()
        for piece in found:
            for each in piece:
                row, col = divmod(each, SIDE)
                for r, c in ((row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)):
                    number = r * SIDE + c
                    if 0 <= r < SIDE and 0 <= c < SIDE and number > pixel and number not in piece:
                        grown.add(tuple(sorted((*piece, number))))
        found = grown
    return tuple(sorted(found))
