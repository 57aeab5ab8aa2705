"""Tree search for the keys that a block of queries sees, as key lists."""

from torch import Tensor

from ...checks import check_int, fail
from ...ops.formats.stripes import KeyLists
from ..attention import check_tensors
from . import op

__all__ = ["tree_select"]


def tree_select(
    query: Tensor,
    key: Tensor,
    *,
    k: int,
    q_block: int,
    k_block: int,
    window_size: int,
    num_sinks: int = 0,
    query_stride: int = 1,
    window: int | None = None,
) -> KeyLists:
    """The first keys, the latest keys, and of those between the ``k`` that a search down a binary tree finds.

    For a block of queries, the keys between are cut into blocks of ``k_block`` and these into ``k / k_block`` segments
    of equal length (to one block). Every segment of more than one block is split in two, each half is scored by the
    block in its middle, with the highest product of a query and one of that block's keys, and the ``k / k_block`` best
    segments stay; so on until all are one block long. O(k * log(Tk / k)) products for a block of queries.
    Paper: Lee et al. 2024 (HiP), https://arxiv.org/abs/2406.09827.

    Args:
        query: ``[B, H, Tq, D]`` float, the last ``Tq`` of the ``Tk`` tokens. Blocks lie at multiples of ``q_block`` of
            the text, so that the front of the first block may be missing.
        key: ``[B, H_kv, Tk, D]``, ``H`` a multiple of ``H_kv``; each query head searches on its own.
        k: keys that the search keeps, at most; a multiple of ``k_block``.
        q_block: queries that share a list.
        k_block: keys that are kept together; blocks are counted from the first key that is searched.
        window_size: latest keys of every query of a block, itself included, which stay without a search.
        num_sinks: first keys of the text, which stay without a search.
        query_stride: of a block each ``query_stride``-th query scores, its last one among them.
        window: sliding window of the model in keys, self included: what no query of a block sees is neither searched
            nor listed, and a product with a key that a query does not see does not count.

    Returns:
        Lists of at most ``num_sinks + k + window_size + q_block - 1`` keys for each head and block; of equal scores the
        lower position wins. No gradient flows.

    Raises:
        InputError: if shapes do not fit each other, or a number is out of range.
    """
    name = "tree_select"
    check_tensors(name, query, key, key)
    for argument, number in (("k", k), ("q_block", q_block), ("k_block", k_block), ("window_size", window_size)):
        check_int(name, argument, number)
    check_int(name, "num_sinks", num_sinks, 0)
    check_int(name, "query_stride", query_stride)
    if window is not None:
        check_int(name, "window", window)
    if k % k_block:
        raise fail(name, "k", f"be a multiple of k_block ({k_block})", k)
    keys = key.shape[2]
    segments = min(k // k_block, max(1, -(-keys // k_block)))
    # What is longer than the text is as long as the text.
    steps = (min(size, max(1, keys)) for size in (k_block, q_block, query_stride))
    sizes = (min(size, keys) for size in (num_sinks, window_size, window or 0))
    positions, counts = op.tree_select(query.detach(), key.detach(), segments, *steps, *sizes)
    return KeyLists(positions, counts, q_block)
