"""Which options a method has at which budget: one explicit line each.

A budget is the share of the causal query–key pairs (prefill), or of the cached keys (decode), that a method may read.
Fixed sizes are computed from it; a method whose budget follows from a threshold is given a `Knob`, which is turned, on
calibration text, until the share that is read is the one wanted. What is really read is measured in every cell.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from ..attention import PolicySearch, PrefillPolicy
from ..attention.portable import options_for

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class Knob:
    """Options that follow from one number, which is found by bisection: the share that is read rises with it.

    Attributes:
        options: the options at a value of it.
        low: its lowest value.
        high: its highest.
    """

    options: Callable[[float], dict[str, Any]]
    low: float
    high: float


Options = dict[str, Any] | Knob


def causal_keys(budget: float, length: int) -> int:
    """Keys a query, so that with causal attention they make up ``budget`` of the pairs of ``length`` tokens."""
    return max(1, round(length * (1 - math.sqrt(1 - budget))))


def _block(length: int) -> int:
    """A size of block, 16 to 64, of which a text has about 128, whatever the budget."""
    return max(16, min(64, 1 << max(0, (length // 128).bit_length() - 1)))


def _block_topk(budget: float, length: int) -> Options:
    size = _block(length)
    blocks = max(2, round(causal_keys(budget, length) / size))
    return {"q_block": size, "k_block": size, "num_blocks": blocks, "force_first": True}


def _chunked(budget: float, length: int) -> Options:
    size = _block(length)
    return {"q_block": size, "k_block": min(32, size), "num_keys": max(size, causal_keys(budget, length))}


def _flexprefill(_budget: float, length: int) -> Options:
    size = _block(length)
    return Knob(lambda share: {"q_block": size, "min_budget": size, "gamma": share}, 0.01, 1.0)


def _hierarchical(budget: float, length: int) -> Options:
    keys = causal_keys(budget, length)
    window = max(1, keys // 4)
    return {"k": max(2, (keys - window) // 2 * 2), "window_size": window}


def _sink_window(budget: float, length: int) -> Options:
    keys = causal_keys(budget, length)
    sinks = min(64, keys // 4)
    return {"num_sinks": sinks, "window_size": max(1, keys - sinks)}


def _tri_shape(budget: float, length: int) -> Options:
    """A quarter of the pairs for the last queries, which read everything."""
    rows = {"num_last": max(1, round(budget / 4 * length / 2))}
    return _sink_window(0.75 * budget, length) | rows  # type: ignore[operator, no-any-return]


def _vertical_slash(budget: float, length: int) -> Options:
    """As many columns as diagonals; a fifth of either is forced, at most as many as by default.

    A diagonal is wider in a block of queries that share their keys, so how many there are is a knob.
    """
    size = _block(length)

    def lines(share: float) -> dict[str, Any]:
        count = max(1, round(share * length))
        forced = {"forced_vertical": min(30, count // 5), "forced_slash": min(100, count // 5)}
        return {"q_block": size, "num_vertical": count, "num_slash": count} | forced

    return Knob(lines, 0.0, 0.3)


def _xattention(_budget: float, length: int) -> Options:
    size = _block(length)
    return Knob(lambda share: {"q_block": size, "k_block": size, "threshold": share}, 0.01, 1.0)


def _keys(budget: float, length: int) -> dict[str, Any]:
    return {"num_keys": max(1, round(budget * length))}


def _keys_everywhere(budget: float, length: int) -> Options:
    """Every layer within the budget, the first ones too."""
    return _keys(budget, length) | {"dense_layers": 0}


def _block_topk_decode(budget: float, length: int) -> Options:
    """A quarter for the latest keys."""
    keys = max(8, round(budget * length))
    return {"num_keys": keys, "window_size": min(64, keys // 4), "num_sinks": min(4, keys // 8), "dense_layers": 0}


def _hierarchical_decode(budget: float, length: int) -> Options:
    keys = max(4, round(budget * length))
    window = max(1, keys // 4)
    return {"k": max(2, (keys - window) // 2 * 2), "window_size": window}


def _paged_selection(budget: float, length: int) -> Options:
    return {"num_keys": max(16, round(budget * length)), "page_size": 16}


def _streaming_decode(budget: float, length: int) -> Options:
    keys = max(2, round(budget * length))
    sinks = min(4, keys // 2)
    return {"num_sinks": sinks, "window_size": keys - sinks}


def _top_p(_budget: float, _length: int) -> Options:
    return Knob(lambda share: {"p": share}, 0.01, 1.0)


def _share(budget: float, _length: int) -> Options:
    return {"density": budget}


def _snapkv(budget: float, length: int) -> Options:
    """The window, which is part of the budget, is at most a quarter of it."""
    return {"density": budget, "window_size": max(1, min(64, round(budget * length) // 4))}


METHODS_AT: dict[str, Callable[[float, int], Options]] = {
    "ada_kv": _share,
    "block_topk": _block_topk,
    "block_topk_decode": _block_topk_decode,
    "chunked_hierarchical": _chunked,
    "double_sparsity": _keys_everywhere,
    "expected_attention": _share,
    "flexprefill": _flexprefill,
    "h2o": _share,
    "hierarchical": _hierarchical,
    "hierarchical_decode": _hierarchical_decode,
    "knorm": _share,
    "oracle_topk": _keys,
    "paged_selection": _paged_selection,
    "pyramidkv": _share,
    "quest": _keys_everywhere,
    "sink_window": _sink_window,
    "snapkv": _snapkv,
    "streaming_decode": _streaming_decode,
    "streaming_llm": _share,
    "tidal": _keys,
    "top_p": _top_p,
    "tova": _share,
    "tri_shape": _tri_shape,
    "vertical_slash": _vertical_slash,
    "xattention": _xattention,
}
"""Options by method, as functions of the budget and of the length of the prompt in tokens."""


def phase_of(method: str) -> Phase:
    """The phase that a method makes sparse.

    Raises:
        InputError: if there is no such method.
    """
    kind = options_for(method)
    if issubclass(kind, PolicySearch):
        kind = get_type_hints(kind.fit).get("return", PrefillPolicy)  # what it finds
    return "prefill" if issubclass(kind, PrefillPolicy) else "decode"
