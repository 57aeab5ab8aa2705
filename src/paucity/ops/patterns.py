"""Fixed patterns over the blocks of a text: which blocks of keys a block of queries sees, whatever these hold.

A pattern is a rule of two indices of blocks, that of the queries and that of the keys, both counted from the start of
the text. `text_blocks` gives the indices of the blocks that are there, `text_mask` makes a mask of what a rule keeps.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_int, check_ndim, check_shape
from .blocks import visible_blocks
from .formats.block import BlockMask


def text_blocks(
    num_queries: int, num_keys: int, block_size: int, *, dropped: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The blocks of the text that have a query, int64 ``[n, 1]``, and those that have a key, ``[m]``.

    Args:
        num_queries: the last tokens.
        num_keys: the tokens that are still there, the queries included.
        block_size: tokens in a block.
        dropped: tokens of the text before the first key.
        device: where the indices live.

    Raises:
        InputError: if ``block_size`` is less than 1, ``dropped`` less than 0, or a number of tokens out of range.
    """
    check_int("text_blocks", "block_size", block_size)
    check_int("text_blocks", "num_queries", num_queries, 1, num_keys)
    check_int("text_blocks", "dropped", dropped, 0)
    length = dropped + num_keys
    first, last = (length - num_queries) // block_size, -(-length // block_size)
    rows = torch.arange(first, last, device=device).unsqueeze(-1)
    return rows, torch.arange(dropped // block_size, last, device=device)


def is_power_of_two(values: Tensor) -> Tensor:
    """Where at most one bit of an int64 is set: 0, 1, 2, 4 and so on; False for negative ones."""
    return (values & (values - 1) == 0) & (values >= 0)


def is_strided(keys: Tensor, stride: int, offset: int | Tensor = 0) -> Tensor:
    """Blocks of keys that are a multiple of ``stride`` apart from block ``-offset``: ``(keys + offset) % stride == 0``.

    ``offset`` may be a tensor, as one for each head ``[H, 1, 1]``, against which ``keys`` broadcast.
    """
    check_int("is_strided", "stride", stride)
    return (keys + offset) % stride == 0


def text_mask(
    kept: Tensor, num_queries: int, num_keys: int, *, block_size: int, dropped: int = 0, window: int | None = None
) -> BlockMask:
    """The mask of the blocks of the text that a rule keeps, exact for every token that a query may see.

    A mask has its blocks at multiples of ``block_size`` of the keys. Where a cropped cache has dropped a part of a
    block, these straddle the blocks of the text, and each is partial by its four quarters.

    Args:
        kept: bool ``[n, m]`` or ``[H, n, m]``, for the blocks of `text_blocks`; later ones than the query's do not
            matter.
        num_queries: the last tokens.
        num_keys: the tokens that are still there, the queries included.
        block_size: tokens in a block.
        dropped: tokens of the text before the first key.
        window: keys that the model lets a query see, itself included: blocks wholly outside are left out, within
            others it is for the kernel to apply.

    Returns:
        ``[1, H or 1, ...]``; the first block of queries is whole (``q_len`` counts its front).

    Raises:
        InputError: if ``kept`` has another shape.
    """
    check_ndim("text_mask", "kept", kept, 2, 3)
    kept = kept if kept.ndim == 3 else kept.unsqueeze(0)
    rows, columns = text_blocks(num_queries, num_keys, block_size, dropped=dropped)
    check_shape("text_mask", "kept", kept, None, len(rows), len(columns))
    before, shift = num_keys - num_queries, dropped % block_size
    q_len = num_queries + before % block_size
    seen = visible_blocks(num_queries, num_keys, block_size, block_size, window=window, device=kept.device)
    if not shift or dropped + num_keys <= block_size:  # one block holds the text, and straddles nothing
        return BlockMask((kept & seen)[None], block_size, block_size, q_len, num_keys)
    grid_rows, grid_columns = seen.shape
    # Row a of the mask has the last tokens of block a of the text, counted from that of the first key, and the first
    # tokens of block a + 1; so have the columns.
    lead = int(rows[0]) - dropped // block_size - before // block_size
    wide = pad(kept, (0, 1 + grid_columns - len(columns), lead, 1 + grid_rows - lead - len(rows)))
    quarters = [wide[:, y : y + grid_rows, x : x + grid_columns] for y in (0, 1) for x in (0, 1)]
    code = torch.stack([quarter.int() << place for place, quarter in enumerate(quarters)]).sum(0) * seen
    inside = (torch.arange(block_size, device=kept.device) >= block_size - shift).int()
    place = 2 * inside.unsqueeze(-1) + inside
    elements = (torch.arange(16, device=kept.device)[:, None, None] >> place & 1).bool()
    partial = torch.where((code > 0) & (code < 15), code, -1).int()
    return BlockMask((code > 0)[None], block_size, block_size, q_len, num_keys, partial[None], elements)
