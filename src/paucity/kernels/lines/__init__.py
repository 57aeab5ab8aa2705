"""Lines of an attention map, columns and diagonals: their mass, and as key lists what is kept of them."""

from torch import Tensor

from ...checks import check_bool, check_divides, check_int, check_ndim, check_shape, fail
from ...ops.formats.stripes import KeyLists
from ..dispatch import check_computable, check_devices
from . import op

__all__ = ["line_lists", "line_mass"]


def line_mass(
    last: Tensor, key: Tensor, *, scale: float, softcap: float | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of the last queries, summed by position of the key and by its distance.

    The native twin holds one tile of it at a time; the reference holds the rows. No gradient flows through it.

    Args:
        last: ``[B, H, R, D]`` float, the queries of the last ``R`` of the ``Tk`` tokens.
        key: ``[B, H_kv, Tk, D]``, ``H`` a multiple of ``H_kv``.
        scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        window: keys visible to a query, itself included.

    Returns:
        ``[B, H, Tk]`` by position and ``[B, H, Tk]`` by distance, float32.

    Raises:
        InputError: if shapes, dtypes or devices do not fit each other, or there are more queries than keys.
        InputTypeError: if a tensor is not floating point.
    """
    name = "line_mass"
    for argument, tensor in (("last", last), ("key", key)):
        check_computable(name, argument, tensor)
        check_ndim(name, argument, tensor, 4)
    check_shape(name, "key", key, last.shape[0], None, None, last.shape[3])
    check_devices(name, last.device, key=key)
    if last.dtype != key.dtype:
        raise fail(name, "key", f"have dtype {last.dtype}", key.dtype)
    if last.shape[1]:
        check_divides(name, "heads of key", max(1, key.shape[1]), last.shape[1], "those of last")
    if last.shape[2] > key.shape[2]:
        raise fail(name, "last", f"have at most as many queries as keys ({key.shape[2]})", last.shape[2])
    if window is not None:
        check_int(name, "window", window)
        window = min(window, max(1, key.shape[2]))
    by_position, by_distance = op.line_mass(last, key, scale, softcap, window)
    return by_position, by_distance


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
