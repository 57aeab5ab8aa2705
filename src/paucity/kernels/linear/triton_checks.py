"""That the parts of a packed weight fit together: looked at once a weight, since a look waits for the GPU."""

import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...checks import fail
from ...ops.formats.packed import unpack_bits

_sound: MutableMapping[Tensor, Any] = (
    WeakTensorKeyDictionary()
)  # the first tensor of a weight → what `_state` said when it was found sound


def check_bits(values: Tensor, bits: Tensor, row_offsets: Tensor | None, cols: int) -> None:
    """Raise InputError unless every row has as many bits as values."""

    def fits() -> bool:
        counts = unpack_bits(bits, cols).sum(-1)
        if row_offsets is None:
            return bool((counts * len(bits) == values.numel()).all())
        ends = row_offsets.long()
        return bool(((counts == ends.diff()).all() & (ends[0] == 0)).item()) and int(ends[-1]) == values.numel()

    if not _is_sound(fits, (values.numel(), cols), bits, row_offsets):
        found = "others" if row_offsets is None else "other offsets or bits"
        raise fail("packed_linear", "weight", "have as many bits in every row as it has values", found)


def check_blocks(values: Tensor, columns: Tensor, row_offsets: Tensor, cols: int) -> None:
    """Raise InputError unless the blocks lie within the weight, and the offsets within the blocks."""
    _check_columns((len(values), values.shape[2]), columns, row_offsets, cols)


def check_groups(codes: Tensor, columns: Tensor, row_offsets: Tensor, cols: int) -> None:
    """The same for groups in 4 bits."""
    _check_columns((len(codes), 2 * codes.shape[1]), columns, row_offsets, cols)


def _check_columns(blocks: tuple[int, int], columns: Tensor, row_offsets: Tensor, cols: int) -> None:
    count, width = blocks

    def fits() -> bool:
        ends, last = row_offsets.long(), cols // width
        inside = (ends[0] >= 0) & (ends[-1] <= count) & (ends.diff() >= 0).all()
        return bool((inside & ((columns >= 0) & (columns < last)).all()).item())

    if not _is_sound(fits, (count, width, cols), columns, row_offsets):
        raise fail("packed_linear", "weight", "have block columns and row offsets within its sizes", "others")


def _is_sound(fits: Callable[[], bool], sizes: tuple[int, ...], first: Tensor, second: Tensor | None) -> bool:
    both = (first,) if second is None else (first, second)
    if any(tensor.is_inference() for tensor in both):  # it does not tell whether it was written to
        return fits()
    known = _sound.get(first)
    state = (sizes, *(tensor._version for tensor in both))
    if known is not None and known[0] == state and known[1]() is second:
        return True
    if not fits():
        return False
    _sound[first] = (state, (lambda: None) if second is None else weakref.ref(second))
    return True
