"""One row for each eviction policy; every row goes through all tests of `test_eviction_properties`.

``full`` are options with which everything stays, to the last bit, at up to 63 tokens. ``sparse`` are options with which
every layer of a text of 29 or of 40 tokens keeps fewer entries than it has, `BUDGET` on average. There are 4 heads of 8
dimensions, in 2 key-value heads and 2 layers.
"""

from dataclasses import dataclass
from typing import Any

from paucity.attention.eviction import EvictionPolicy
from paucity.attention.portable import methods, options_for

BUDGET = 12


@dataclass(frozen=True)
class Row:
    """Options of a method for the shared tests.

    Attributes:
        full: beside ``num_keys`` 1000.
        sparse: beside ``num_keys`` of `BUDGET`.
        rotary: whether a rotary embedding is needed.
        by_key: whether heads that share keys may have them each for themselves, and nothing changes.
        even: whether all lists of a layer keep `BUDGET` entries.
        error: how far attention is from that over what stays, for a cache that keeps it in fewer bits.
    """

    full: dict[str, Any]
    sparse: dict[str, Any]
    rotary: bool = False
    by_key: bool = False
    even: bool = True
    error: float = 1e-5

    def policy(self, method: str, which: str, **options: Any) -> EvictionPolicy:
        budget = {"num_keys": 1000 if which == "full" else BUDGET}
        return options_for(method)(**{**budget, **getattr(self, which), **options})


ROWS: dict[str, Row] = {
    "ada_kv": Row(full={}, sparse={"policy": {"method": "snapkv", "window_size": 4}, "safeguard": 0.5}, even=False),
    "expected_attention": Row(full={}, sparse={"num_sinks": 2, "num_future": 8, "num_queries": 8}, rotary=True),
    "h2o": Row(full={}, sparse={}),
    "knorm": Row(full={}, sparse={}, by_key=True),
    "pyramidkv": Row(full={"beta": 1.0}, sparse={"beta": 3.0, "window_size": 3, "kernel_size": 3}, even=False),
    "quantised": Row(
        full={"num_recent": 1000},
        sparse={"density": None, "num_recent": 3, "group_size": 4, "bits": 8, "policy": {"method": "tova"}},
        error=2e-2,
    ),
    "snapkv": Row(full={}, sparse={"window_size": 4, "kernel_size": 3}),
    "streaming_llm": Row(full={}, sparse={"num_sinks": 3}, rotary=True, by_key=True),
    "tova": Row(full={}, sparse={}, by_key=True),
}
METHODS = [name for name in methods() if issubclass(options_for(name), EvictionPolicy)]


def policy(method: str, which: str, **options: Any) -> EvictionPolicy:
    """The ``full`` or the ``sparse`` policy of a method, with some options changed."""
    return ROWS[method].policy(method, which, **options)
