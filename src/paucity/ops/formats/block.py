"""Block-sparse attention patterns."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import InputTypeError, check_bool, check_int, check_ndim, check_shape, check_tensor, fail
from .pairs import element_counts, visible_counts, visible_elements


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which blocks of keys each block of queries sees, for each batch entry and head.

    Positions are aligned at the end: query ``i`` stands at key position ``i + kv_len - q_len``. The last block of
    either side is short where the length is no multiple. A kept block is kept whole unless it is partial, with a mask
    of its own; the causal cut inside blocks is asked for where it matters (``to_dense``, ``density``).

    Attributes:
        blocks: bool ``[B, H, ceil(q_len / q_block), ceil(kv_len / k_block)]``, True is kept; ``B`` and ``H`` may be
            1 for a pattern that all share.
        q_block: queries in a block.
        k_block: keys in a block.
        q_len: queries.
        kv_len: keys.
        partial: int32, the shape of ``blocks``: the entry of ``elements`` that says which elements of a kept block
            stay, -1 where all do; None where no block is partial.
        elements: bool ``[num_partial, q_block, k_block]``, True is kept; None where no block is partial. What lies
            beyond the end of a short block does not matter.
    """

    blocks: Tensor
    q_block: int
    k_block: int
    q_len: int
    kv_len: int
    partial: Tensor | None = None
    elements: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise InputError unless the parts fit together."""
        nq, nk = _num_blocks("BlockMask", self.q_len, self.kv_len, self.q_block, self.k_block)
        check_bool("BlockMask", "blocks", self.blocks)
        check_shape("BlockMask", "blocks", self.blocks, None, None, nq, nk)
        if (self.partial is None) != (self.elements is None):
            raise fail("BlockMask", "elements", "be given together with partial", "one of them")
        if self.partial is None or self.elements is None:
            return
        check_tensor("BlockMask", "partial", self.partial)
        if self.partial.dtype != torch.int32:
            raise InputTypeError(f"BlockMask: partial must be torch.int32, got {self.partial.dtype}.")
        check_shape("BlockMask", "partial", self.partial, *self.blocks.shape)
        check_bool("BlockMask", "elements", self.elements)
        check_shape("BlockMask", "elements", self.elements, None, self.q_block, self.k_block)

    @classmethod
    def causal(
        cls, q_len: int, kv_len: int | None = None, *, q_block: int, k_block: int, device: torch.device | str = "cpu"
    ) -> Self:
        """All blocks with at least one causal element: ``B = H = 1``; ``kv_len`` None is ``q_len``."""
        kv_len = q_len if kv_len is None else kv_len
        _num_blocks("BlockMask.causal", q_len, kv_len, q_block, k_block)
        counts = element_counts(q_len, kv_len, q_block, k_block, causal=True, device=torch.device(device))
        return cls((counts > 0)[None, None], q_block, k_block, q_len, kv_len)

    @classmethod
    def from_dense(cls, mask: Tensor, *, q_block: int, k_block: int, exact: bool = False) -> Self:
        """Keep each block of which ``mask`` (bool ``[B, H, Tq, Tk]``) keeps any element.

        With ``exact``, blocks of which it keeps only some are partial, so that ``to_dense`` gives ``mask`` back.
        """
        check_bool("BlockMask.from_dense", "mask", mask)
        check_ndim("BlockMask.from_dense", "mask", mask, 4)
        q_len, kv_len = mask.shape[-2:]
        nq, nk = _num_blocks("BlockMask.from_dense", q_len, kv_len, q_block, k_block)
        beyond = (0, nk * k_block - kv_len, 0, nq * q_block - q_len)
        shape = (*mask.shape[:2], nq, q_block, nk, k_block)
        blocks = F.pad(mask, beyond).view(shape).any(5).any(3)
        whole = cls(blocks, q_block, k_block, q_len, kv_len)
        if not exact:
            return whole
        tiles = F.pad(mask, beyond, value=True).view(shape).transpose(3, 4)
        where = blocks & ~tiles.flatten(-2).all(-1)
        return whole._with_tiles(where, tiles[where])

    @classmethod
    def from_lists(
        cls, kv_num_blocks: Tensor, kv_indices: Tensor, *, q_block: int, k_block: int, q_len: int, kv_len: int
    ) -> Self:
        """From ``kv_num_blocks`` ``[B, H, nq]`` and ``kv_indices`` ``[B, H, nq, width]``, read up to the count.

        Raises:
            InputError: if shapes do not match, a count exceeds the width or a counted index is no block.
        """
        nq, nk = _num_blocks("BlockMask.from_lists", q_len, kv_len, q_block, k_block)
        check_shape("BlockMask.from_lists", "kv_num_blocks", kv_num_blocks, None, None, nq)
        check_shape("BlockMask.from_lists", "kv_indices", kv_indices, *kv_num_blocks.shape, None)
        width = kv_indices.shape[-1]
        if ((kv_num_blocks < 0) | (kv_num_blocks > width)).any():
            raise fail("BlockMask.from_lists", "kv_num_blocks", f"be in [0, {width}]", _ends(kv_num_blocks))
        counted = torch.arange(width, device=kv_indices.device) < kv_num_blocks.unsqueeze(-1)
        index = torch.where(counted, kv_indices.long(), nk)
        if ((index < 0) | (index > nk) | (counted & (index == nk))).any():
            raise fail("BlockMask.from_lists", "kv_indices", f"be in [0, {nk})", _ends(kv_indices[counted]))
        blocks = torch.zeros(*index.shape[:-1], nk + 1, dtype=torch.bool, device=index.device)
        return cls(blocks.scatter_(-1, index, True)[..., :nk], q_block, k_block, q_len, kv_len)

    @property
    def kv_num_blocks(self) -> Tensor:
        """Kept key blocks of each query block: int32 ``[B, H, nq]``."""
        return self.blocks.sum(-1, dtype=torch.int32)

    @property
    def kv_indices(self) -> Tensor:
        """Kept key blocks, ascending, then the others: int32 ``[B, H, nq, nk]``.

        The full width is what ``FlexAttention``'s ``BlockMask.from_kv_blocks`` needs (it takes the number of key blocks
        from it); ``kv_indices[..., : kv_num_blocks.max()]`` is the shortest that holds all.
        """
        return self.blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).int()

    def to_dense(self, *, causal: bool = False) -> Tensor:
        """Elements kept: bool ``[B, H, q_len, kv_len]``; ``causal`` drops ``j > i + kv_len - q_len``."""
        wide = self.blocks.repeat_interleave(self.q_block, -2)
        if self.partial is not None:
            tiles = self.blocks[..., None, None].repeat(1, 1, 1, 1, self.q_block, self.k_block)
            where = self._partial_where()
            tiles[where] = self._tiles(where)
            wide = tiles.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        else:
            wide = wide.repeat_interleave(self.k_block, -1)
        dense = wide[..., : self.q_len, : self.kv_len]
        return dense.tril(self.kv_len - self.q_len) if causal else dense

    def density(self, *, causal: bool = True) -> Tensor:
        """Share of the elements that are kept, float32 ``[B, H]``: of the causal ones, or of all."""
        shape = (self.q_len, self.kv_len, self.q_block, self.k_block)
        total = element_counts(*shape, causal=causal, device=self.blocks.device).sum()
        return (self.kept_pairs(self.q_len, self.kv_len, causal=causal).double() / total).float()

    def kept_pairs(
        self,
        num_queries: int,
        num_keys: int,
        *,
        padding: Tensor | None = None,
        window: int | None = None,
        causal: bool = True,
    ) -> Tensor:
        """Pairs of a query and a key that it sees, ``[B, H]`` int64, padded queries not counted.

        Args:
            num_queries: ``q_len``.
            num_keys: ``kv_len``.
            padding: ``[B, kv_len]`` bool, False where a key is padding.
            window: keys visible to a query, itself included.
            causal: whether later keys are hidden.

        Raises:
            InputError: if the lengths are others than those of the mask.
        """
        if (num_queries, num_keys) != (self.q_len, self.kv_len):
            raise fail(
                "BlockMask.kept_pairs", "pattern", f"be for {num_queries} queries and {num_keys} keys", repr(self)
            )
        sizes, device = (self.q_len, self.kv_len, self.q_block, self.k_block), self.blocks.device
        counts = visible_counts(*sizes, padding=padding, window=window, causal=causal, device=device)
        kept = torch.where(self.blocks, counts, 0).sum((-2, -1))
        if self.partial is None:
            return kept
        b, h, i, j = self._partial_where().expand(len(kept), -1, -1, -1).nonzero(as_tuple=True)
        seen = visible_elements(b, i, j, *sizes, padding=padding, window=window, causal=causal)
        tiles = self._tiles((b if len(self.blocks) > 1 else torch.zeros_like(b), h, i, j))
        lost = (seen & ~tiles).sum((-2, -1))
        return kept.index_put((b, h), -lost, accumulate=True)

    def to(self, device: torch.device | str) -> Self:
        """The same on ``device``."""
        partial, elements = (None if x is None else x.to(device) for x in (self.partial, self.elements))
        return replace(self, blocks=self.blocks.to(device), partial=partial, elements=elements)

    def __and__(self, other: object) -> Self:
        """Elements that both keep; sizes 1 of ``B`` and ``H`` broadcast."""
        return self._combine(other, torch.logical_and) if isinstance(other, BlockMask) else NotImplemented

    def __or__(self, other: object) -> Self:
        """Elements that either keeps; sizes 1 of ``B`` and ``H`` broadcast."""
        return self._combine(other, torch.logical_or) if isinstance(other, BlockMask) else NotImplemented

    def _combine(self, other: "BlockMask", function: Callable[[Tensor, Tensor], Tensor]) -> Self:
        blocks = function(self.blocks, self._same(other))
        both = replace(self, blocks=blocks, partial=None, elements=None)
        if self.partial is None and other.partial is None:
            return both
        mine, theirs = (x._expand(blocks.shape) for x in (self, other))
        where = blocks & (mine._partial_where() | theirs._partial_where())
        return both._with_tiles(where, function(mine._tiles(where), theirs._tiles(where)))

    def _expand(self, shape: torch.Size) -> "BlockMask":
        partial = None if self.partial is None else self.partial.expand(shape)
        return replace(self, blocks=self.blocks.expand(shape), partial=partial)

    def _partial_where(self) -> Tensor:
        """Kept blocks that are partial, the shape of ``blocks``."""
        return torch.zeros_like(self.blocks) if self.partial is None else self.blocks & (self.partial >= 0)

    def _tiles(self, where: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Elements of the blocks at ``where``: bool ``[n, q_block, k_block]``."""
        tiles = self.blocks[where][:, None, None].expand(-1, self.q_block, self.k_block)
        if self.partial is None or self.elements is None or not len(self.elements):
            return tiles
        entry = self.partial[where].long()
        return tiles & (self.elements[entry.clamp(min=0)] | (entry < 0)[:, None, None])

    def _with_tiles(self, where: Tensor, tiles: Tensor) -> Self:
        """The same with the blocks at ``where`` made whole, partial or dropped, by their elements ``tiles``."""
        i, j = where.nonzero(as_tuple=True)[2:]
        rows = (i * self.q_block).unsqueeze(-1) + torch.arange(self.q_block, device=i.device) < self.q_len
        columns = (j * self.k_block).unsqueeze(-1) + torch.arange(self.k_block, device=i.device) < self.kv_len
        inside = rows.unsqueeze(-1) & columns.unsqueeze(1)
        some, every = (tiles & inside).any(-1).any(-1), (tiles | ~inside).all(-1).all(-1)
        blocks = self.blocks.masked_scatter(where, some)
        number = torch.where(some & ~every, (some & ~every).cumsum(0) - 1, -1).int()
        if not (some & ~every).any():
            return replace(self, blocks=blocks)
        partial = torch.full_like(blocks, -1, dtype=torch.int32).masked_scatter(where, number)
        return replace(self, blocks=blocks, partial=partial, elements=(tiles | ~inside)[some & ~every])

    def _same(self, other: "BlockMask") -> Tensor:
        mine = (self.q_block, self.k_block, self.q_len, self.kv_len)
        theirs = (other.q_block, other.k_block, other.q_len, other.kv_len)
        heads = zip(self.blocks.shape[:2], other.blocks.shape[:2], strict=True)
        if mine != theirs or any(a != b and 1 not in (a, b) for a, b in heads):
            raise fail("BlockMask", "other", f"have the batch, heads, blocks and lengths of {self!r}", repr(other))
        return other.blocks

    def __repr__(self) -> str:
        """Batch, heads, lengths, block sizes, the share of blocks kept and how many are partial."""
        (batch, heads), share = self.blocks.shape[:2], self.blocks.float().mean().item()
        sizes = f"{self.q_len}x{self.kv_len} in {self.q_block}x{self.k_block}"
        partial = "" if self.partial is None else f", {int(self._partial_where().sum())} partial"
        return f"BlockMask([{batch}, {heads}], {sizes}, {share:.3f} of the blocks{partial})"


def _num_blocks(function: str, q_len: int, kv_len: int, q_block: int, k_block: int) -> tuple[int, int]:
    for name, size in (("q_len", q_len), ("kv_len", kv_len), ("q_block", q_block), ("k_block", k_block)):
        check_int(function, name, size)
    return -(-q_len // q_block), -(-kv_len // k_block)


def _ends(values: Tensor) -> list[int]:
    return [int(end) for end in values.aminmax()]
