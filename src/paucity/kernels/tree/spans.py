"""What a block of queries sees in any case, and what it searches: the sizes that all twins share."""

import torch
from torch import Tensor


def num_blocks(queries: int, keys: int, q_block: int) -> int:
    """Blocks of queries, at multiples of ``q_block`` of the text."""
    return -(-keys // q_block) - (keys - queries) // q_block


def width(keys: int, segments: int, k_block: int, q_block: int, num_sinks: int, window_size: int) -> int:
    """Most keys that a list can have."""
    return min(keys, num_sinks + segments * k_block + window_size + q_block - 1)


def spans(queries: int, keys: int, q_block: int, num_sinks: int, window_size: int, window: int) -> Tensor:
    """``[blocks, 5]`` int64 on the CPU: first query, stop, and the keys ``oldest <= far <= near < stop``.

    Keys in ``[oldest, far)`` and ``[near, stop)`` are seen in any case, those in ``[far, near)`` are searched;
    ``window`` is that of the model, 0 for none.
    """
    before = keys - queries
    start = torch.arange(before // q_block, before // q_block + num_blocks(queries, keys, q_block)) * q_block
    first, stop = start.clamp(min=before), (start + q_block).clamp(max=keys)
    oldest = (first - window + 1).clamp(min=0) if window else torch.zeros_like(first)
    near = torch.maximum(first - window_size + 1, oldest)
    far = torch.maximum(near.clamp(max=num_sinks), oldest)
    return torch.stack([first, stop, oldest, far, near], dim=-1)
