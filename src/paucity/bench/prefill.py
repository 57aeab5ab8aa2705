"""Prefill with sparse attention, selection included, against causal SDPA in the same run.

Methods are the best one of those that answer passkey prompts of 4,096 and 8,192 tokens at least 95 % as well as the
dense model does. Their attention part is timed on the queries, keys and values that the embedded model has on real
text, all layers together; prompts longer than its context of 8,192 tokens are timed, not answered. A random Llama of
100 M parameters has the shape of a larger model, and no answers at all.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from ..attention import PrefillPolicy, apply, from_json, record
from ..attention.apply import Observed
from ..attention.compute import attend_exactly
from ..kernels.attention import Problem, dense
from ..measure.cost import Comparison, prefill, time_interleaved
from ..measure.data import held_out_python
from ..measure.retrieval import retrieval_accuracy
from ..measure.tokens import encode, leading_ids
from ..models.load import Loaded, load
from ..ops.formats.stripes import Window
from . import BenchRow

CROSSOVER = (256, 512, 1024, 2048, 4096, 8192)
LONG = (16384, 32768)
ANSWERED, NUM_PROMPTS, KEPT = (4096, 8192), 12, 0.95
RANDOM_LLAMA = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
VOCABULARY = 32000
POLICIES: dict[str, PrefillPolicy] = {
    name: from_json({"method": name, "min_length": 0, **options})
    for name, options in {
        "sink_window": {"num_sinks": 64, "window_size": 512},
        "vertical_slash": {"num_vertical": 256, "num_slash": 128},
    }.items()
}
