"""One row for each decode policy; every row goes through all tests of `test_decode_properties`.

``full`` are options with which a method reads everything of up to 63 keys, ``sparse`` are options with which it reads
less than 95 % of 30 and more, over the layers of a model with two. There are 4 heads of 8 dimensions in 2 KV heads.
"""

from dataclasses import dataclass
from typing import Any

from paucity.attention.decode import DecodePolicy
from paucity.attention.portable import methods, options_for


@dataclass(frozen=True)
class Row:
    """Options of a method for the shared tests; every length and layer is sparse unless they say otherwise."""

    full: dict[str, Any]
    sparse: dict[str, Any]

    def policy(self, method: str, which: str, **options: Any) -> DecodePolicy:
        return options_for(method)(**{"min_length": 0, "dense_layers": 0, **getattr(self, which), **options})


ROWS: dict[str, Row] = {
    "block_topk_decode": Row(
        full={"num_keys": 1000, "page_size": 4},
        sparse={"num_keys": 12, "page_size": 2, "num_sinks": 2, "window_size": 4},
    ),
    "double_sparsity_channels": Row(
        full={"channels": [[[3, 1]]] * 2, "num_keys": 1000},
        sparse={"channels": [[[3, 1, 4]], [[0, 6, 7]]], "num_keys": 9, "group_size": 5},
    ),
    "hierarchical_decode": Row(
        full={"k": 64},
        sparse={"k": 4, "window_size": 5, "num_sinks": 1, "refresh_every": 1},
    ),
    "oracle_topk": Row(full={"num_keys": 1000}, sparse={"num_keys": 9}),
    "paged_selection": Row(
        full={"num_keys": 1000, "page_size": 8, "streaming": [[0], []], "window_size": 1000},
        sparse={"num_keys": 12, "page_size": 4, "num_chunks": 2, "reselect_every": 1},
    ),
    "quest": Row(full={"num_keys": 1000, "page_size": 5}, sparse={"num_keys": 12, "page_size": 4}),
    "streaming_decode": Row(full={"num_sinks": 3, "window_size": 1000}, sparse={"num_sinks": 3, "window_size": 7}),
    "streaming_heads": Row(
        full={"streaming": [[0], [0, 1]], "window_size": 1000},
        sparse={"streaming": [[1], [0, 1]], "num_sinks": 2, "window_size": 5, "page_size": 4},
    ),
    "tidal": Row(full={"num_keys": 1000}, sparse={"num_keys": 9}),
    "top_p": Row(full={"p": 1.0}, sparse={"p": 0.6}),
}
METHODS = sorted(name for name, method in methods().items() if issubclass(method.load(), DecodePolicy))


def policy(method: str, which: str, **options: Any) -> DecodePolicy:
    """The policy of a row."""
    return ROWS[method].policy(method, which, **options)
