"""Formats: what holds the entries that stay, each with an exact way back to the dense tensor."""

from .block import BlockMask
from .block_rows import PackedBlocks
from .codes import Codes
from .csr import PackedCSR
from .groups import PackedGroups
from .masks import Masks, SparsityReport
from .packed import PackedBitmask, PackedNM, pack_bits, unpack_bits

__all__ = [
    "BlockMask",
    "Codes",
    "Masks",
    "PackedBitmask",
    "PackedBlocks",
    "PackedCSR",
    "PackedGroups",
    "PackedNM",
    "SparsityReport",
    "pack_bits",
    "unpack_bits",
]
