"""Sparse attention on Hugging Face models: policies that choose what a prompt reads, and `apply` that installs one."""

from .apply import AppliedAttention, apply, remove
from .block_sparse import BlockSparse
from .compute import Attended, Part, attend_pattern
from .crossover import Crossover, crossover
from .flash import Flash
from .longgen import LongGen
from .block_topk import BlockTopK
from .compute import Attended, Part, attend_pattern
from .minference import HeadChoice, MInference
from .hierarchical import Hierarchical
from .influence import Influence, influence
from .moa import MoA
from .grid import Grid
from .neighbourhood import Neighbourhood, neighbourhood_attention
from .per_head import PerHead
from .policy import PolicySearch, PrefillPolicy
from .portable import from_json, load_policy, save_policy, to_json
from .power import Power
from .prompt import Prompt
from .sharded import Sharded
from .sink_window import SinkWindow
from .spans import Spans
from .telemetry import LayerTelemetry, observe
from .tri_shape import TriShape
from .vertical_slash import VerticalSlash
from .watch import record

__all__ = [
    "AppliedAttention",
    "Attended",
    "Crossover",
    "BlockSparse",
    "Flash",
    "Hierarchical",
    "LayerTelemetry",
    "LongGen",
    "BlockTopK",
    "HeadChoice",
    "LayerTelemetry",
    "MInference",
    "Influence",
    "LayerTelemetry",
    "MoA",
    "Grid",
    "LayerTelemetry",
    "Neighbourhood",
    "Part",
    "PerHead",
    "PolicySearch",
    "Power",
    "PrefillPolicy",
    "Prompt",
    "Sharded",
    "SinkWindow",
    "TriShape",
    "Spans",
    "VerticalSlash",
    "apply",
    "attend_pattern",
    "crossover",
    "from_json",
    "influence",
    "load_policy",
    "neighbourhood_attention",
    "observe",
    "record",
    "remove",
    "save_policy",
    "to_json",
]
