"""Block-sparse attention patterns."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_bool, check_int, check_ndim, check_shape, fail


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
        elements: bool ``[num_partial, q_block, k_block]``, True is kept; None where no block is partial.
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

    @classmethod
    def causal(
        cls, q_len: int, kv_len: int | None = None, *, q_block: int, k_block: int, device: torch.device | str = "cpu"
    ) -> Self:
        """All blocks with at least one causal element: ``B = H = 1``; ``kv_len`` None is ``q_len``."""
        kv_len = q_len if kv_len is None else kv_len
        _num_blocks("BlockMask.causal", q_len, kv_len, q_block, k_block)
        counts = _element_counts(q_len, kv_len, q_block, k_block, causal=True, device=torch.device(device))
        return cls((counts > 0)[None, None], q_block, k_block, q_len, kv_len)

    @classmethod
    def from_dense(cls, mask: Tensor, *, q_block: int, k_block: int) -> Self:
        """Keep each block of which ``mask`` (bool ``[B, H, Tq, Tk]``) keeps any element."""
        check_bool("BlockMask.from_dense", "mask", mask)
        check_ndim("BlockMask.from_dense", "mask", mask, 4)
        q_len, kv_len = mask.shape[-2:]
        nq, nk = _num_blocks("BlockMask.from_dense", q_len, kv_len, q_block, k_block)
        padded = F.pad(mask, (0, nk * k_block - kv_len, 0, nq * q_block - q_len))
        blocks = padded.view(*mask.shape[:2], nq, q_block, nk, k_block).any(5).any(3)
        return cls(blocks, q_block, k_block, q_len, kv_len)

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
        """Elements of kept blocks: bool ``[B, H, q_len, kv_len]``; ``causal`` drops ``j > i + kv_len - q_len``."""
        wide = self.blocks.repeat_interleave(self.q_block, -2)[..., : self.q_len, :]
        dense = wide.repeat_interleave(self.k_block, -1)[..., : self.kv_len]
        return dense.tril(self.kv_len - self.q_len) if causal else dense

    def density(self, *, causal: bool = True) -> Tensor:
        """Share of the elements that kept blocks cover, float32 ``[B, H]``: of the causal ones, or of all."""
        shape = (self.q_len, self.kv_len, self.q_block, self.k_block)
        counts = _element_counts(*shape, causal=causal, device=self.blocks.device)
        covered = torch.where(self.blocks, counts, 0).sum((-2, -1))
        return (covered.double() / counts.sum()).float()

    def to(self, device: torch.device | str) -> Self:
        """The same on ``device``."""
        return self._with(self.blocks.to(device))

    def __and__(self, other: object) -> Self:
        """Blocks that both keep; sizes 1 of ``B`` and ``H`` broadcast."""
        return self._with(self.blocks & self._same(other)) if isinstance(other, BlockMask) else NotImplemented

    def __or__(self, other: object) -> Self:
        """Blocks that either keeps; sizes 1 of ``B`` and ``H`` broadcast."""
        return self._with(self.blocks | self._same(other)) if isinstance(other, BlockMask) else NotImplemented

    def _with(self, blocks: Tensor) -> Self:
        return type(self)(blocks, self.q_block, self.k_block, self.q_len, self.kv_len)

    def _same(self, other: "BlockMask") -> Tensor:
        mine = (self.q_block, self.k_block, self.q_len, self.kv_len)
        theirs = (other.q_block, other.k_block, other.q_len, other.kv_len)
        heads = zip(self.blocks.shape[:2], other.blocks.shape[:2], strict=True)
        if mine != theirs or any(a != b and 1 not in (a, b) for a, b in heads):
            raise fail("BlockMask", "other", f"have the batch, heads, blocks and lengths of {self!r}", repr(other))
        return other.blocks

    def __repr__(self) -> str:
        """Batch, heads, lengths, block sizes and the share of blocks kept."""
        (batch, heads), share = self.blocks.shape[:2], self.blocks.float().mean().item()
        sizes = f"{self.q_len}x{self.kv_len} in {self.q_block}x{self.k_block}"
        return f"BlockMask([{batch}, {heads}], {sizes}, {share:.3f} of the blocks)"


def _num_blocks(function: str, q_len: int, kv_len: int, q_block: int, k_block: int) -> tuple[int, int]:
    for name, size in (("q_len", q_len), ("kv_len", kv_len), ("q_block", q_block), ("k_block", k_block)):
        check_int(function, name, size)
    return -(-q_len // q_block), -(-kv_len // k_block)


def _element_counts(
    q_len: int, kv_len: int, q_block: int, k_block: int, *, causal: bool, device: torch.device
) -> Tensor:
    """Elements (causal ones, or all) in each block: int64 ``[nq, nk]``, without building them."""
    q_edges = torch.arange(0, q_len + q_block, q_block, device=device).clamp_(max=q_len)
    k_edges = torch.arange(0, kv_len + k_block, k_block, device=device).clamp_(max=kv_len)
    width = k_edges.diff()
    if not causal:
        return q_edges.diff()[:, None] * width
    # Query i sees clamp(i + 1 + kv_len - q_len - start, 0, width) keys of a block; summed over queries below each edge.
    seen = q_edges[:, None] + (kv_len - q_len) - k_edges[:-1]
    inside = seen.clamp(min=0).minimum(width)
    below = inside * (inside + 1) // 2 + (seen - width).clamp(min=0) * width
    return below.diff(dim=0)


def _ends(values: Tensor) -> list[int]:
    return [int(end) for end in values.aminmax()]
