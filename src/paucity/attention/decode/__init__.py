"""Decode policies: which cached keys a step with one token reads."""

from .block_topk import BlockTopKDecode
from .oracle import OracleTopK
from .policy import DecodePolicy, Pages, Read
from .quest import Quest
from .streaming import StreamingDecode
from .tidal import Tidal
from .top_p import TopP

__all__ = [
    "BlockTopKDecode",
    "DecodePolicy",
    "OracleTopK",
    "Pages",
    "Quest",
    "Read",
    "StreamingDecode",
    "Tidal",
    "TopP",
]
