"""Triton twin of the lists: a program walks the keys of a block of queries in chunks. The mass is the reference's."""
# mypy: disable-error-code="import-untyped, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .op import num_blocks
from .reference import covered_by, mass

__all__ = ["counts", "mass", "positions"]

_CHUNK = 1024  # keys that a program looks at at a time


def counts(vertical: Tensor, slash: Tensor, num_queries: int, q_block: int) -> Tensor:
    """As in the reference."""
    blocks = num_blocks(vertical.shape[-1], num_queries, q_block)
    found = torch.empty(*vertical.shape[:2], blocks, dtype=torch.int64, device=vertical.device)
    _run(vertical, slash, found, None, num_queries, q_block, 0)
    return found


def positions(vertical: Tensor, slash: Tensor, counts: Tensor, num_queries: int, q_block: int, width: int) -> Tensor:
    """As in the reference."""
    found = counts.new_full((*counts.shape, width), -1, dtype=torch.int32)
    _run(vertical, slash, counts.contiguous(), found, num_queries, q_block, width)
    return found


def _run(
    vertical: Tensor, slash: Tensor, counts: Tensor, found: Tensor | None, num_queries: int, q_block: int, width: int
) -> None:
    if not counts.numel():
        return
    keys = vertical.shape[-1]
    covered, first = covered_by(slash, q_block), (keys - num_queries) // q_block * q_block
    _walk[(counts.shape[0] * counts.shape[1], counts.shape[2])](
        vertical.contiguous().view(torch.uint8),
        covered.contiguous().view(torch.uint8),
        counts,
        found,
        keys,
        covered.shape[-1],
        first,
        q_block,
        width,
        WRITE=found is not None,
        CHUNK=min(_CHUNK, int(triton.next_power_of_2(keys))),
    )


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    vertical, covered, counts, found, keys, reach, first, q_block, width, WRITE: tl.constexpr, CHUNK: tl.constexpr
):
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = head * tl.num_programs(1) + block
    start = first + block * q_block
    count = tl.zeros((), tl.int64)
    if WRITE:
        count += width - tl.load(counts + row)
    for at in range(0, tl.minimum(keys, start + q_block), CHUNK):
        key = at + tl.arange(0, CHUNK)
        inside = key < tl.minimum(keys, start + q_block)
        kept = tl.load(vertical + head * keys + key, mask=inside, other=0)
        kept |= tl.load(covered + head * reach + keys + key - start, mask=inside, other=0)
        kept = kept.to(tl.int32)
        if WRITE:
            tl.store(found + row * width + count + tl.cumsum(kept, 0) - 1, key, mask=kept != 0)
        count += tl.sum(kept, 0)
    if not WRITE:
        tl.store(counts + row, count)
