"""Lines of an attention map as key lists: columns that all queries see, and diagonals in tiles."""

from torch import Tensor

from ...checks import check_bool, check_int, check_ndim, check_shape
from ...ops.formats.stripes import KeyLists
from ..dispatch import check_devices
from . import op

__all__ = ["line_lists"]


def line_lists(vertical: Tensor, slash: Tensor, *, num_queries: int, q_block: int) -> KeyLists:
    """The keys that kept columns and kept distances give each block of queries.

    The block of queries that begins at ``s`` sees the kept columns before ``s + q_block``, and for each kept distance
    ``d`` the keys ``s - d`` to ``s - d + q_block - 1``; a key of both counts once. Blocks lie at multiples of
    ``q_block`` of the text, so that of the first one the front may be missing among the queries. Memory is that of the
    lists; the reference holds a mask of a few blocks of queries besides.

    Args:
        vertical: ``[B, H, Tk]`` bool by position.
        slash: ``[B, H, Tk]`` bool by distance.
        num_queries: the last tokens are queries, at most ``Tk``.
        q_block: queries in a block.

    Raises:
        InputError: if shapes or devices differ, or a number is out of range.
        InputTypeError: if a mask is not bool.
    """
    name = "line_lists"
    check_bool(name, "vertical", vertical)
    check_bool(name, "slash", slash)
    check_ndim(name, "vertical", vertical, 3)
    check_shape(name, "slash", slash, *vertical.shape)
    check_devices(name, vertical.device, slash=slash)
    check_int(name, "q_block", q_block)
    check_int(name, "num_queries", num_queries, 0, vertical.shape[-1])
    # The tile of any distance in a block twice as long as the text is the text.
    size = min(q_block, max(1, 2 * vertical.shape[-1]))
    counts = op.line_counts(vertical, slash, num_queries, size)
    width = int(counts.max()) if counts.numel() else 0
    return KeyLists(op.line_positions(vertical, slash, counts, num_queries, size, width), counts, q_block)
