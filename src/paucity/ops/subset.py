"""Some of the tokens of each text of a batch: taken out in their order, and put back among zeros.

Texts may keep different numbers: shorter ones are filled up at the end, where no earlier token of a causal model looks,
with tokens that are not kept; what is made of these is not put back and gets no gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_bool, check_ndim, check_shape, fail


@dataclass(frozen=True)
class Subset:
    """The tokens that stay, as `subset` makes it.

    Attributes:
        index: ``[B, K]`` int64, positions; those of a row are ascending as far as they are kept.
        present: ``[B, K]`` bool, False where a row is filled up.
        length: tokens of the text.
    """

    index: Tensor
    present: Tensor
    length: int

    @property
    def is_all(self) -> bool:
        """Whether every token of every row stays."""
        return self.index.shape[1] == self.length and bool(self.present.all())

    def take(self, x: Tensor) -> Tensor:
        """The kept tokens of ``x`` ``[B or 1, T, ...]``: ``[B, K, ...]``, differentiable.

        Raises:
            InputError: if the shape does not fit.
        """
        batch, rest = len(self.index), x.shape[2:]
        if x.ndim < 2 or x.shape[0] not in (1, batch) or x.shape[1] != self.length:
            raise fail("Subset.take", "x", f"have shape [{batch} or 1, {self.length}, ...]", list(x.shape))
        if batch == 1:
            return x.index_select(1, self.index[0])
        return x.expand(batch, *x.shape[1:]).gather(1, self._spread(rest))

    def take_mask(self, mask: Tensor) -> Tensor:
        """An attention mask over the kept tokens: ``[B, 1 or H, K, K]``.

        Args:
            mask: ``[B or 1, 1 or H, T, T]``, bool (True is seen) or floating (added to the logits). Kept tokens see no
                filling; filling sees itself, so that no row is empty.

        Raises:
            InputError: if the shape does not fit.
        """
        check_ndim("Subset.take_mask", "mask", mask, 4)
        check_shape("Subset.take_mask", "mask", mask, None, None, self.length, self.length)
        mask = mask.expand(len(self.index), *mask.shape[1:])
        rows = torch.take_along_dim(mask, self.index[:, None, :, None], dim=2)
        both = torch.take_along_dim(rows, self.index[:, None, None, :], dim=3)
        if bool(self.present.all()):
            return both
        own = torch.eye(self.index.shape[1], dtype=torch.bool, device=mask.device)
        seen = torch.where(self.present[:, None, :, None], self.present[:, None, None, :], own)
        if mask.dtype == torch.bool:
            return (both & seen) | (own & ~self.present[:, None, :, None])
        return torch.where(seen, both, torch.finfo(both.dtype).min)

    def put(self, y: Tensor, into: Tensor | None = None) -> Tensor:
        """``y`` ``[B, K, ...]`` back in its places: ``[B, T, ...]``, differentiable.

        Args:
            y: what was made of the kept tokens.
            into: ``[B, T, ...]``, what is elsewhere; None is zero.
        """
        out = y.new_zeros(y.shape[0], self.length, *y.shape[2:]) if into is None else into
        if not bool(self.present.all()):
            present = self.present.view(*self.present.shape, *[1] * (y.ndim - 2))
            y = torch.where(present, y, self.take(out))
        if len(y) == 1:
            return out.index_copy(1, self.index[0], y)
        return out.scatter(1, self._spread(y.shape[2:]), y)

    def _spread(self, rest: torch.Size) -> Tensor:
        return self.index.view(*self.index.shape, *[1] * len(rest)).expand(*self.index.shape, *rest)


def subset(kept: Tensor) -> Subset:
    """The tokens where ``kept`` ``[B, T]`` is True.

    Raises:
        InputError: if it is not bool with two dimensions.
    """
    check_bool("subset", "kept", kept)
    check_ndim("subset", "kept", kept, 2)
    counts = kept.sum(-1)
    widest = int(counts.max()) if kept.numel() else 0
    index = kept.byte().argsort(dim=-1, descending=True, stable=True)[:, :widest]
    present = torch.arange(widest, device=kept.device) < counts[:, None]
    return Subset(index, present, kept.shape[1])
