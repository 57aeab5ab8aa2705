"""Sparse attention on Hugging Face models: policies that choose what a prompt reads, and `apply` that installs one."""

from .apply import AppliedAttention, apply, remove
from .policy import PrefillPolicy, Prompt
from .sink_window import SinkWindow
from .vertical_slash import VerticalSlash

__all__ = ["AppliedAttention", "PrefillPolicy", "Prompt", "SinkWindow", "VerticalSlash", "apply", "remove"]
