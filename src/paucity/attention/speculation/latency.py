"""How long a pass over a tree takes here, by its size: what the hardware-aware tree is chosen by."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ...checks import check_int
from ...measure.cost import time_interleaved
from ...measure.tokens import device_of, evaluating
from .passes import text_pass, tree_pass, tree_passes


def measure_tree_latency(
    model: nn.Module, sizes: Sequence[int], *, context: int = 512, repeats: int = 9
) -> dict[int, float]:
    """Seconds of a pass by the number of tokens in its tree, measured in turns: for `hardware_aware_tree`.

    Args:
        model: a causal language model.
        sizes: tokens of a tree, each at least 1.
        context: tokens in the cache.
        repeats: passes of each size; the median counts.
    """
    name = "measure_tree_latency"
    for size in sizes:
        check_int(name, "sizes", size)
    check_int(name, "context", context)
    cache, device = DynamicCache(), device_of(model)
    with evaluating(model), tree_passes(model):
        zeros = torch.zeros(1, context, dtype=torch.long, device=device)
        text_pass(model, cache, zeros, keep=1)
        known: Tensor = model.get_input_embeddings()(zeros[:, :1])  # type: ignore[operator]

        def one(size: int) -> None:
            # A comb, as most trees are: half of the tokens in a row, the others behind the root.
            parents = [index - 1 if index <= size // 2 else 0 for index in range(size)]
            tree_pass(model, cache, known.expand(1, size, -1), torch.tensor(parents, device=device) + context)
            cache.crop(-size)

        timed = time_interleaved({str(size): partial(one, size) for size in sizes}, repeats=repeats, warmup=2)
    return {size: timed.timings[str(size)].median for size in sizes}
