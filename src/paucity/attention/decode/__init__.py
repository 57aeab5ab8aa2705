"""Decode policies: which cached keys a step with one token reads."""

from .block_topk import BlockTopKDecode
from .double_sparsity_channels import DoubleSparsityChannels
from .hierarchical_decode import HierarchicalDecode
from .masked_heads import masked_heads
from .needles import Needle, copy_prompts, needle_prompts
from .oracle import OracleTopK
from .paged_selection import PagedSelection
from .policy import DecodePolicy, Pages, Read
from .quest import Quest
from .streaming import StreamingDecode
from .streaming_heads import StreamingHeads
from .tidal import Tidal
from .top_p import TopP

__all__ = [
    "BlockTopKDecode",
    "DecodePolicy",
    "DoubleSparsityChannels",
    "HierarchicalDecode",
    "Needle",
    "OracleTopK",
    "PagedSelection",
    "Pages",
    "Quest",
    "Read",
    "StreamingDecode",
    "StreamingHeads",
    "Tidal",
    "TopP",
    "copy_prompts",
    "masked_heads",
    "needle_prompts",
]
