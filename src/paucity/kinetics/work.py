"""Operations and bytes of prefill, of decode steps and of test-time strategies, counted from the shape of a model.

Paper: Sadhukhan et al. 2025, "Kinetics: Rethinking Test-Time Scaling Laws", https://arxiv.org/abs/2506.05333, its cost
model. Of ``N`` trials of ``L_out`` tokens after a prompt of ``L_in``, with ``P`` parameters,
``D`` cached elements a token and ``r`` query heads to a key-value head, it counts::

    operations: 2 N P L_out + 2 r N L_in D L_out + r N D L_out^2        bytes: 2 L_in D L_out + N D L_out^2

where the trials read the keys of their prompt once for all. Here the sum over the steps is exact (``L (L + 1) / 2``
instead of ``L^2 / 2``: a token sees itself), ``P`` is the matrices alone, layers with a window read their window,
two bytes an element are those of the dtype, and the prefill and the weights are counted too; what a total leaves out is
said where it is made (`predict.eflops` leaves out weights and prefill, as the paper does). Products are counted as
`measure.flops` counts them; of norms, activations and rotations only the bytes are, for the time that they take.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..checks import check_int, fail
from ..measure.machine import norm_bytes
from .reading import Reading
from .shape import Shape


class Amount(NamedTuple):
    """Floating-point operations, and bytes moved."""

    flops: float = 0
    num_bytes: float = 0

    def __add__(self, other: object) -> "Amount":
        """Both together."""
        if not isinstance(other, Amount):
            return NotImplemented
        return Amount(self.flops + other.flops, self.num_bytes + other.num_bytes)

    def __mul__(self, times: object) -> "Amount":
        """So many times."""
        if not isinstance(times, int | float):
            return NotImplemented
        return Amount(self.flops * times, self.num_bytes * times)


_NONE = Amount()


@dataclass(frozen=True)
class Work:
    """What a number of equal or growing forward passes do, all together.

    Attributes:
        rows: rows of each matrix product of one pass.
        passes: forward passes.
        layers: layers run, over all passes.
        linear: matrix products, and their weights read once a pass.
        attention: over all visible keys, of a prefill or of the layers that read everything; bytes are those of the
            cache, in a prefill none, where keys stay near.
        listed: attention over chosen keys.
        search: the choice of keys.
        searches: layers that choose, over all passes.
        moved: bytes that norms, rotations, activations and residuals read and write.
        text: tokens of each text of a prefill; 0 where the passes decode.
    """

    rows: int
    passes: int
    layers: int
    linear: Amount
    attention: Amount
    listed: Amount = _NONE
    search: Amount = _NONE
    searches: float = 0
    moved: float = 0
    text: int = 0

    @property
    def flops(self) -> float:
        """All operations."""
        return self.linear.flops + self.attention.flops + self.listed.flops + self.search.flops

    @property
    def reading(self) -> Amount:
        """Attention and the choice of its keys together: all that depends on the context."""
        return self.attention + self.listed + self.search


@dataclass(frozen=True)
class Workload:
    """A batch of prompts, each answered once or several times.

    One long chain of thought is a long ``generate``; best of N is ``trials=N``.

    Attributes:
        prompt: tokens of a prompt, the paper's ``L_in``.
        generate: tokens of an answer, the paper's ``L_out``.
        batch: prompts at a time.
        trials: answers to each prompt, the paper's ``N``.
        shared_prompt: whether the trials of a prompt read its keys once for all of them, as the paper takes it; False
            where each reads its own copy, as ``generate(num_return_sequences=...)`` does.
    """

    prompt: int
    generate: int
    batch: int = 1
    trials: int = 1
    shared_prompt: bool = True

    def __post_init__(self) -> None:
        for field in ("prompt", "generate", "batch", "trials"):
            check_int("Workload", field, getattr(self, field))


def prefill(shape: Shape, tokens: int, *, batch: int = 1) -> Work:
    """The prompt in one pass, causal, with the logits of its last token.

    Args:
        shape: of the model.
        tokens: of each prompt.
        batch: prompts.
    """
    check_int("prefill", "tokens", tokens)
    check_int("prefill", "batch", batch)
    pairs = sum(_sum_min(1, tokens, window) for window in shape.windows)
    return Work(
        rows=batch * tokens,
        passes=1,
        layers=shape.layers,
        linear=_linear(shape, batch * tokens, batch),
        attention=Amount(batch * pairs * _pair_flops(shape)),
        moved=batch * tokens * _moved(shape),
        text=tokens,
    )


def decode(
    shape: Shape,
    context: int,
    *,
    steps: int = 1,
    batch: int = 1,
    trials: int = 1,
    shared_prompt: bool = True,
    reading: Reading | None = None,
) -> Work:
    """Steps of one token a sequence; step ``i``, from 1 on, sees ``context + i`` keys, its own included.

    Args:
        shape: of the model.
        context: tokens cached before the first step: the prompt.
        steps: tokens generated in each sequence.
        batch: prompts.
        trials: sequences of each prompt.
        shared_prompt: whether the trials of a prompt read its keys once for all. Chosen keys are each trial's own
            (the paper's code shares the search alone).
        reading: which keys a step reads; None is all.
    """
    check_int("decode", "context", context, 0)
    for argument, value in (("steps", steps), ("batch", batch), ("trials", trials)):
        check_int("decode", argument, value)
    dense = 0 if reading is None else min(reading.dense_layers, shape.layers)
    if reading is not None and dense == shape.layers:
        raise fail("decode", "reading", f"leave some of the {shape.layers} layers sparse", f"{dense} dense ones")
    attention = listed = search = _NONE
    searches = 0.0
    last = context + steps
    item = shape.layer_cache * shape.itemsize
    for layer, window in enumerate(shape.windows):
        seen = _sum_min(context + 1, last, window)
        own = _sum_min(1, steps, window)
        read_once = (seen - own) + own * trials if shared_prompt else seen * trials
        if reading is None or layer < dense:
            attention += Amount(trials * seen * _pair_flops(shape), read_once * item)
            continue
        chosen = reading.keys(context + 1, last, window)
        listed += Amount(trials * chosen * _pair_flops(shape), trials * chosen * item)
        share = reading.searched(context + 1, last, window) / seen if seen else 0.0
        keys = shape.kv_heads * shape.dim * shape.itemsize
        products = 2 * shape.heads * shape.dim
        search += Amount(
            share * trials * seen * products * reading.search_flops, share * read_once * keys * reading.search_bytes
        )
        searches += reading.choices(context + 1, last, window)
    rows = batch * trials
    return Work(
        rows=rows,
        passes=steps,
        layers=steps * shape.layers,
        linear=_linear(shape, rows, rows) * steps,
        attention=attention * batch,
        listed=listed * batch,
        search=search * batch,
        searches=searches,
        moved=rows * steps * _moved(shape),
    )


def generation(shape: Shape, workload: Workload, *, reading: Reading | None = None) -> tuple[Work, Work]:
    """Prefill and decoding of a workload; each prompt is prefilled once, whatever its trials.

    Args:
        shape: of the model.
        workload: prompts and answers.
        reading: which keys a decode step reads; None is all.
    """
    steps = decode(
        shape,
        workload.prompt,
        steps=workload.generate,
        batch=workload.batch,
        trials=workload.trials,
        shared_prompt=workload.shared_prompt,
        reading=reading,
    )
    return prefill(shape, workload.prompt, batch=workload.batch), steps


def _linear(shape: Shape, rows: int, logits: int) -> Amount:
    """One pass over ``rows`` tokens, ``logits`` of which get logits."""
    return Amount(2 * (rows * shape.linear + logits * shape.head), (shape.linear + shape.head) * shape.itemsize)


def _pair_flops(shape: Shape) -> int:
    """Of one query token and one key token in one layer."""
    return 2 * shape.heads * (shape.dim + shape.value_dim)


def _moved(shape: Shape) -> int:
    """Bytes that the operators between the products of a layer read and write of one token, in all layers.

    Counted in transformers' Llama: two norms and residuals; a rotation makes a half-turned copy, two products and a
    sum; the activation is applied and multiplied.
    """
    item = shape.itemsize
    hidden = shape.hidden * 2 * (norm_bytes(item) + 3 * item)
    turned = (shape.heads + shape.kv_heads) * shape.dim * 11 * item
    inner = shape.inner * 5 * item
    return shape.layers * (hidden + turned + inner)


def _sum_min(first: int, last: int, cap: int | None) -> int:
    """Sum of ``min(n, cap)`` for n from ``first`` to ``last``."""
    top = last if cap is None else min(last, cap)
    rising = (first + top) * (top - first + 1) // 2 if top >= first else 0
    return rising + (0 if cap is None else cap * (last - max(first - 1, cap)) if last > cap else 0)
