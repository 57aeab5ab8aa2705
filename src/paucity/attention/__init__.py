"""Sparse attention on Hugging Face models: policies that choose what a prompt or a step reads and what stays cached."""

from .anchor import Anchor
from .apply import AppliedAttention, AppliedDecode, AppliedEviction, Observed, apply, remove
from .block_sparse import BlockSparse
from .block_topk import BlockTopK
from .cache import Cached, SparseLayer, Store
from .chunked_hierarchical import ChunkedHierarchical
from .compute import Attended, Part, attend_pattern
from .crossover import Crossover, crossover
from .decode import DecodePolicy, OracleTopK, Pages, Read
from .dual_chunk import DualChunk
from .eviction import EvictionPolicy, Knorm
from .flash import Flash
from .flexprefill import FlexPrefill
from .grid import Grid
from .hierarchical import Hierarchical
from .hyper import Hyper
from .influence import Influence, influence
from .lemo import AppliedLeMo, LeMo
from .longgen import LongGen
from .minference import HeadChoice, MInference
from .moa import MoA
from .neighbourhood import Neighbourhood, neighbourhood_attention
from .per_head import PerHead
from .policy import PolicySearch, PrefillPolicy
from .portable import from_json, load_policy, save_policy, to_json
from .power import Power
from .prompt import Prompt
from .refine import RefinedBudgets
from .sharded import Sharded
from .shared_llm import SharedLLM, SharedOptions, SharedTraining
from .sink_window import SinkWindow
from .spans import Spans
from .speculation import Speculation, prompt_decode, speculate
from .telemetry import LayerTelemetry, observe
from .tri_shape import TriShape
from .vertical_slash import VerticalSlash
from .watch import look, record, watch
from .xattention import XAttention

__all__ = [
    "Anchor",
    "AppliedAttention",
    "AppliedDecode",
    "AppliedEviction",
    "AppliedLeMo",
    "Attended",
    "BlockSparse",
    "BlockTopK",
    "Cached",
    "ChunkedHierarchical",
    "Crossover",
    "DecodePolicy",
    "DualChunk",
    "EvictionPolicy",
    "Flash",
    "FlexPrefill",
    "Grid",
    "HeadChoice",
    "Hierarchical",
    "Hyper",
    "Influence",
    "Knorm",
    "LayerTelemetry",
    "LeMo",
    "LongGen",
    "MInference",
    "MoA",
    "Neighbourhood",
    "Observed",
    "OracleTopK",
    "Pages",
    "Part",
    "PerHead",
    "PolicySearch",
    "Power",
    "PrefillPolicy",
    "Prompt",
    "Read",
    "RefinedBudgets",
    "Sharded",
    "SharedLLM",
    "SharedOptions",
    "SharedTraining",
    "SinkWindow",
    "Spans",
    "SparseLayer",
    "Speculation",
    "Store",
    "TriShape",
    "VerticalSlash",
    "XAttention",
    "apply",
    "attend_pattern",
    "crossover",
    "from_json",
    "influence",
    "load_policy",
    "look",
    "neighbourhood_attention",
    "observe",
    "prompt_decode",
    "record",
    "remove",
    "save_policy",
    "speculate",
    "to_json",
    "watch",
]
