"""Sparse attention on Hugging Face models: policies that choose what a prompt or a step reads and what stays cached."""

from .anchor import Anchor
from .apply import AppliedAttention, AppliedDecode, AppliedEviction, Observed, apply, remove
from .block_sparse import BlockSparse
from .block_topk import BlockTopK
from .cache import Cached, SparseLayer, Store
from .chunked_hierarchical import ChunkedHierarchical
from .compute import Attended, Part, attend_pattern
from .crossover import Crossover, crossover
from .decode import (
    BlockTopKDecode,
    DecodePolicy,
    DoubleSparsityChannels,
    HierarchicalDecode,
    Needle,
    OracleTopK,
    PagedSelection,
    Pages,
    Quest,
    Read,
    StreamingDecode,
    StreamingHeads,
    Tidal,
    TopP,
    copy_prompts,
    masked_heads,
    needle_prompts,
)
from .double_sparsity import DoubleSparsity
from .dual_chunk import DualChunk
from .eviction import (
    AdaKV,
    EvictionPolicy,
    ExpectedAttention,
    H2o,
    Knorm,
    PyramidKV,
    Quantised,
    SnapKV,
    StreamingLLM,
    Tova,
)
from .flash import Flash
from .flexprefill import FlexPrefill
from .grid import Grid
from .hierarchical import Hierarchical
from .hyper import Hyper
from .influence import Influence, influence
from .lemo import AppliedLeMo, LeMo
from .longgen import LongGen
from .lserve import LServe, prefill_split
from .minference import HeadChoice, MInference
from .moa import MoA
from .neighbourhood import Neighbourhood, neighbourhood_attention
from .per_head import PerHead
from .policy import PolicySearch, PrefillPolicy
from .portable import from_json, load_policy, save_policy, to_json
from .power import Power
from .prompt import Prompt
from .refine import RefinedBudgets
from .retrieval_heads import RetrievalHeads, retrieval_scores
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
    "AdaKV",
    "Anchor",
    "AppliedAttention",
    "AppliedDecode",
    "AppliedEviction",
    "AppliedLeMo",
    "Attended",
    "BlockSparse",
    "BlockTopK",
    "BlockTopKDecode",
    "Cached",
    "ChunkedHierarchical",
    "Crossover",
    "DecodePolicy",
    "DoubleSparsity",
    "DoubleSparsityChannels",
    "DualChunk",
    "EvictionPolicy",
    "ExpectedAttention",
    "Flash",
    "FlexPrefill",
    "Grid",
    "H2o",
    "HeadChoice",
    "Hierarchical",
    "HierarchicalDecode",
    "Hyper",
    "Influence",
    "Knorm",
    "LServe",
    "LayerTelemetry",
    "LeMo",
    "LongGen",
    "MInference",
    "MoA",
    "Needle",
    "Neighbourhood",
    "Observed",
    "OracleTopK",
    "PagedSelection",
    "Pages",
    "Part",
    "PerHead",
    "PolicySearch",
    "Power",
    "PrefillPolicy",
    "Prompt",
    "PyramidKV",
    "Quantised",
    "Quest",
    "Read",
    "RefinedBudgets",
    "RetrievalHeads",
    "Sharded",
    "SharedLLM",
    "SharedOptions",
    "SharedTraining",
    "SinkWindow",
    "SnapKV",
    "Spans",
    "SparseLayer",
    "Speculation",
    "Store",
    "StreamingDecode",
    "StreamingHeads",
    "StreamingLLM",
    "Tidal",
    "TopP",
    "Tova",
    "TriShape",
    "VerticalSlash",
    "XAttention",
    "apply",
    "attend_pattern",
    "copy_prompts",
    "crossover",
    "from_json",
    "influence",
    "load_policy",
    "look",
    "masked_heads",
    "needle_prompts",
    "neighbourhood_attention",
    "observe",
    "prefill_split",
    "prompt_decode",
    "record",
    "remove",
    "retrieval_scores",
    "save_policy",
    "speculate",
    "to_json",
    "watch",
]
