"""One row for each prefill policy; every row goes through all tests of `test_apply` and `test_properties`.

``full`` are options with which the method keeps everything at up to 63 tokens, ``sparse`` are options with which it
keeps less than 95 % of the pairs at 29 and at 40 tokens. There are 4 heads of 8
dimensions, in 2 key-value heads and 2 layers.
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

    def policy(self, method: str, which: str, **options: Any) -> PrefillPolicy:
        return options_for(method)(**{"min_length": 8 * (which == "sparse"), **getattr(self, which), **options})


ROWS: dict[str, Row] = {
    "block_topk": Row(
        full={"num_blocks": 1000, "q_block": 16, "k_block": 8},
        sparse={"num_blocks": 3, "q_block": 8, "k_block": 4},
    ),
    "chunked_hierarchical": Row(
        full={"num_keys": 1000, "boundary_threshold": 1.0, "q_block": 16, "boundary_window": 2, "min_chunk": 4},
        sparse={"density": 0.25, "q_block": 8, "k_block": 4},
    ),
    "flexprefill": Row(
        full={"min_budget": 1000, "q_block": 16},
        sparse={"gamma": 0.3, "tau": 0.2, "min_budget": 4, "q_block": 4},
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
    "sink_window": Row(
        full={"num_sinks": 0, "window_size": 1000, "q_block": 16},
        sparse={"num_sinks": 2, "window_size": 5, "q_block": 8},
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
