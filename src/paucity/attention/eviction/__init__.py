"""Eviction policies: which keys and values stay in the cache."""

from .ada_kv import AdaKV
from .expected_attention import ExpectedAttention
from .h2o import H2o
from .knorm import Knorm
from .policy import EvictionPolicy
from .pyramidkv import PyramidKV
from .quantised import Quantised
from .snapkv import SnapKV
from .streaming_llm import StreamingLLM
from .tova import Tova

__all__ = [
    "AdaKV",
    "EvictionPolicy",
    "ExpectedAttention",
    "H2o",
    "Knorm",
    "PyramidKV",
    "Quantised",
    "SnapKV",
    "StreamingLLM",
    "Tova",
]
