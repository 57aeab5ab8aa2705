"""Formats: what holds the entries that stay, each with an exact way back to the dense tensor."""

from .block import BlockMask
from .block_rows import PackedBlocks
from .codes import Codes
from .csr import PackedCSR
from .groups import PackedGroups
from .mask_report import SparsityReport
from .mask_training import Averaged, average_models
from .masks import Masks
from .packed import PackedBitmask, PackedNM, pack_bits, unpack_bits

__all__ = [
    "Averaged",
    "BlockMask",
    "Codes",
    "Masks",
    "PackedBitmask",
    "PackedBlocks",
    "PackedCSR",
    "PackedGroups",
    "PackedNM",
    "SparsityReport",
    "average_models",
    "pack_bits",
    "unpack_bits",
]
