"""Sparse attention on Hugging Face models: policies that choose what a prompt reads, and `apply` that installs one."""

from .apply import AppliedAttention, apply, remove
from .block_topk import BlockTopK
from .chunked_hierarchical import ChunkedHierarchical
from .compute import Attended, Part, attend_pattern
from .flexprefill import FlexPrefill
from .per_head import PerHead
from .policy import PolicySearch, PrefillPolicy
from .portable import from_json, load_policy, save_policy, to_json
from .prompt import Prompt
from .sink_window import SinkWindow
from .telemetry import LayerTelemetry, observe
from .vertical_slash import VerticalSlash
from .xattention import XAttention

__all__ = [
    "AppliedAttention",
    "Attended",
    "BlockTopK",
    "ChunkedHierarchical",
    "FlexPrefill",
    "LayerTelemetry",
    "Part",
    "PerHead",
    "PolicySearch",
    "PrefillPolicy",
    "Prompt",
    "SinkWindow",
    "VerticalSlash",
    "XAttention",
    "apply",
    "attend_pattern",
    "from_json",
    "load_policy",
    "observe",
    "remove",
    "save_policy",
    "to_json",
]
