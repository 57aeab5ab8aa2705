"""One row for each prefill policy; every row goes through all tests of `test_apply` and `test_properties`.

``full`` are options with which the method keeps everything at up to 63 tokens, ``sparse`` are options with which it
keeps less than 95 % of the pairs at 29 and at 40 tokens (unless it is ``exact`` and always keeps all). There are 4
heads of 8 dimensions, in 2 key-value heads and 2 layers.
"""

from dataclasses import dataclass
from typing import Any

from paucity.attention.policy import PrefillPolicy
from paucity.attention.portable import methods, options_for


@dataclass(frozen=True)
class Row:
    """Options of a method for the shared tests; ``min_length`` is 0 in ``full`` and 8 in ``sparse`` unless given."""

    full: dict[str, Any]
    sparse: dict[str, Any]
    exact: bool = False

    def policy(self, method: str, which: str, **options: Any) -> PrefillPolicy:
        return options_for(method)(**{"min_length": 8 * (which == "sparse"), **getattr(self, which), **options})


ROWS: dict[str, Row] = {
    "anchor": Row(
        full={"theta": 1e9, "step": 2, "q_block": 8},
        sparse={"theta": 0.0, "step": 2, "q_block": 4},
    ),
    "block_sparse": Row(full={"local_blocks": 1000, "q_block": 16}, sparse={"q_block": 4}),
    "block_topk": Row(
        full={"num_blocks": 1000, "q_block": 16, "k_block": 8},
        sparse={"num_blocks": 3, "q_block": 8, "k_block": 4},
    ),
    "chunked_hierarchical": Row(
        full={"num_keys": 1000, "boundary_threshold": 1.0, "q_block": 16, "boundary_window": 2, "min_chunk": 4},
        sparse={"density": 0.25, "q_block": 8, "k_block": 4},
    ),
    "dual_chunk": Row(
        full={"q_block": 16, "prefill_chunk": 64},
        sparse={
            "chunk_size": 64,
            "local_size": 8,
            "prefill_chunk": 16,
            "q_block": 4,
            "sparse": {
                "num_vertical": 6,
                "num_slash": 4,
                "forced_vertical": 2,
                "forced_slash": 2,
                "num_last_queries": 4,
                "min_length": 8,
            },
        },
    ),
    "flash": Row(full={"q_block": 16}, sparse={"q_block": 8}, exact=True),
    "flexprefill": Row(
        full={"min_budget": 1000, "q_block": 16},
        sparse={"gamma": 0.3, "tau": 0.2, "min_budget": 4, "q_block": 4},
    ),
    "grid": Row(
        full={"strides": [1], "num_sinks": 0, "window_size": 1, "num_vertical": 0, "q_block": 16},
        sparse={
            "strides": [5, 8],
            "num_sinks": 1,
            "window_size": 4,
            "num_vertical": 2,
            "num_last_queries": 4,
            "spans": [[3, 13], [16, 36]],
            "boundary": "both",
            "q_block": 4,
        },
    ),
    "hierarchical": Row(
        full={"k": 64, "q_block": 16},
        sparse={"k": 2, "q_block": 4, "k_block": 1, "window_size": 2, "num_sinks": 1},
    ),
    "hyper": Row(
        full={"exact_length": 3, "q_block": 2, "num_samples": 1000},
        sparse={"exact_length": 2, "q_block": 2, "num_samples": 1},
    ),
    "neighbourhood": Row(
        full={"shape": [3, 4, 5], "start": 2, "window_size": 100, "q_block": 16},
        sparse={
            "shape": [3, 2, 4],
            "start": 3,
            "window_size": [2, 2, 3],
            "stride": [1, 2, 1],
            "dilation": [2, 1, 1],
            "text_window": 7,
            "q_block": 4,
            "k_block": 8,
        },
    ),
    "per_head": Row(
        full={
            "choices": [
                {"method": "sink_window", "num_sinks": 0, "window_size": 1000},
                {"method": "vertical_slash", "num_vertical": 1000, "num_slash": 1, "q_block": 16, "forced_slash": 0},
            ],
            "assignment": [[0, 1, 1, 1], 1],
        },
        sparse={
            "choices": [
                {"method": "sink_window", "num_sinks": 2, "window_size": 5},
                {"method": "sink_window", "num_sinks": 0, "window_size": 9},
            ],
            "assignment": [[0, 1, 1, 1], 1],
        },
    ),
    "power": Row(full={"window_blocks": 1000, "q_block": 16}, sparse={"window_blocks": 2, "q_block": 4}),
    "sharded": Row(
        full={"local_blocks": 1000, "vert_stride": 4, "q_block": 16},
        sparse={"local_blocks": 2, "vert_stride": 4, "q_block": 4},
    ),
    "sink_window": Row(
        full={"num_sinks": 0, "window_size": 1000, "q_block": 16},
        sparse={"num_sinks": 2, "window_size": 5, "q_block": 8},
    ),
    "spans": Row(
        full={"alpha": [[1000, 0, 0, 0], 0], "beta": [[0, 1, 1, 1], 1], "num_sinks": 0, "block_size": 1},
        sparse={
            "alpha": [[3, -4, 0, 6], 0],
            "beta": [[0.0, 0.5, 0.25, 0.0], 0.25],
            "num_sinks": 2,
            "block_size": 2,
            "q_block": 8,
        },
    ),
    "tri_shape": Row(
        full={"num_sinks": 0, "window_size": 1000, "q_block": 16},
        sparse={"num_sinks": 2, "window_size": 5, "num_last": 3, "q_block": 8},
    ),
    "vertical_slash": Row(
        full={"num_vertical": 1000, "num_slash": 1, "q_block": 16, "forced_slash": 0},
        sparse={
            "num_vertical": 6,
            "num_slash": 4,
            "forced_vertical": 2,
            "forced_slash": 2,
            "num_last_queries": 4,
            "q_block": 4,
        },
    ),
    "xattention": Row(
        full={"threshold": 1.0, "stride": 4, "q_block": 16, "k_block": 8},
        sparse={"threshold": 0.3, "stride": 2, "q_block": 4, "k_block": 4},
    ),
}
METHODS = [name for name in methods() if issubclass(options_for(name), PrefillPolicy)]


def policy(method: str, which: str, **options: Any) -> PrefillPolicy:
    """The ``full`` or the ``sparse`` policy of a method, with some options changed."""
    return ROWS[method].policy(method, which, **options)
