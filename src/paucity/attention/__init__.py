"""Sparse attention on Hugging Face models: policies that choose what a prompt reads, and `apply` that installs one."""

from .apply import AppliedAttention, apply, remove
from .compute import Attended, Part, attend_pattern
from .dual_chunk import DualChunk
from .per_head import PerHead
from .policy import PolicySearch, PrefillPolicy
from .portable import from_json, load_policy, save_policy, to_json
from .prompt import Prompt
from .refine import RefinedBudgets
from .sink_window import SinkWindow
from .telemetry import LayerTelemetry, observe
from .vertical_slash import VerticalSlash

__all__ = [
    "AppliedAttention",
    "Attended",
    "DualChunk",
    "LayerTelemetry",
    "Part",
    "PerHead",
    "PolicySearch",
    "PrefillPolicy",
    "Prompt",
    "RefinedBudgets",
    "SinkWindow",
    "VerticalSlash",
    "apply",
    "attend_pattern",
    "from_json",
    "load_policy",
    "observe",
    "remove",
    "save_policy",
    "to_json",
]
