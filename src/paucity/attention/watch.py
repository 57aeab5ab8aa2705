"""What a prompt brings to the attention of each layer, and how long a policy takes over it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.attention import Problem, dense
from ..measure.cost import time_interleaved
from ..measure.tokens import device_of, evaluating, forward
from ..ops.formats.stripes import Window
from .apply import apply
from .compute import attend_exactly
from .policy import PrefillPolicy
from .prefill import AppliedAttention, Observed
from .sink_window import SinkWindow


class Seconds(NamedTuple):
    """Median times of one attention: with a policy, of its choice alone (part of it), and of dense attention."""

    sparse: float
    select: float
    dense: float


def watch(applied: AppliedAttention, note: Callable[[Observed], None], run: Callable[[], object]) -> None:
    """Tell ``note`` of every attention that the policy computes while the model runs; no density is counted.

    Args:
        applied: a policy in force.
        note: told layer by layer; what it raises ends the run.
        run: calls the model.
    """
    applied.observer = note
    try:
        with evaluating(applied.model):
            run()
    finally:
        applied.observer = None


def look(
    model: nn.Module, input_ids: Tensor, note: Callable[[Observed], None], *, layers: Sequence[int] | None = None
) -> None:
    """Tell ``note`` what dense attention of each layer gets from a prompt; the model is left as it was.

    Args:
        model: a Hugging Face causal language model without a policy.
        input_ids: ``[B, T]`` int64, without padding.
        note: told layer by layer.
        layers: which layers; None is all.
    """
    exact = SinkWindow(num_sinks=0, window_size=max(1, input_ids.shape[1]), min_length=0)
    applied = apply(model, exact, layers=layers)
    try:
        watch(applied, note, partial(forward, model, input_ids.to(device_of(model)), keep=1))
    finally:
        applied.remove()


def record(model: nn.Module, input_ids: Tensor, *, layers: Sequence[int] | None = None) -> list[Observed]:
    """What `look` tells of, all layers at once."""
    seen: list[Observed] = []
    look(model, input_ids, seen.append, layers=layers)
    return seen


@torch.no_grad()
def attention_seconds(policy: PrefillPolicy, seen: Observed, *, repeats: int = 3) -> Seconds:
    """Times of one attention, in turns: of ``policy`` and of dense attention on the same queries, keys and values.

    Dense is ``scaled_dot_product_attention``; where logits are capped or windowed, which it does not do, our own exact
    attention.
    """
    query, key, value, prompt, _ = seen
    select: list[float] = []
    problem = Problem(Window(max(1, key.shape[2])), prompt.scale)

    def sparse() -> None:
        select.append(policy.compute(query, key, value, prompt).select_seconds)

    def exact() -> None:
        if prompt.softcap is None and prompt.window is None:
            dense.attention(query, key, value, problem)
        else:
            attend_exactly(query, key, value, prompt)

    timings = time_interleaved({"dense": exact, "sparse": sparse}, repeats=repeats).timings
    chosen = sorted(select[1:])[repeats // 2]
    return Seconds(timings["sparse"].median, chosen, timings["dense"].median)
