"""Seconds on a measured machine, the paper's eFLOPs, and the context from which on attention dominates.

Paper: Sadhukhan et al. 2025 (Kinetics), https://arxiv.org/abs/2506.05333: ``eFLOPs = operations + I * bytes`` with the
machine's operations a byte ``I`` (562.5 for an NVIDIA B200). Attention against parameters is
``Phi = (2 r L_in D + (r + I) D L_out) / (2 P)``.

Seconds are a sum of stages, since an eager program runs one operator after another; each stage is as long as its
arithmetic or its bytes take, whichever is longer, at rates measured for that kind of operator and number of rows
(`measure.machine.Rates`). To them come the calls: what a layer of a small model takes besides its products. On a GPU
calls run ahead of the work, and the longer of both counts (no GPU has been tried). Described is transformers' own model
code in eager mode with `measure.dense` for its cache and its single queries; `DynamicCache`, which copies the cache on
every step, is slower. A model whose weights fit in the processor's caches is faster than predicted; layers with a
window are slower in the prefill, where transformers computes what the window hides.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..checks import check_range
from ..measure.machine import Machine, Rates, interpolate
from .reading import Reading
from .shape import Shape
from .work import Amount, Work, decode

B200_INTENSITY = 562.5
"""FLOP a byte of the paper's machine."""
_SEARCH_CALLS = 8  # operators that a choice takes besides its products: means, sums over a group, top-k, indices


@dataclass(frozen=True)
class Seconds:
    """Where the time goes.

    Attributes:
        linear: matrix products, their weights read.
        attention: keys and values.
        search: the choice of keys.
        moved: norms, rotations, activations.
        calls: what layers take besides.
        overlap: whether calls run beside the work instead of before it.
    """

    linear: float = 0.0
    attention: float = 0.0
    search: float = 0.0
    moved: float = 0.0
    calls: float = 0.0
    overlap: bool = False

    @property
    def total(self) -> float:
        """All of it."""
        work = self.linear + self.attention + self.search + self.moved
        return max(work, self.calls) if self.overlap else work + self.calls

    @property
    def attention_share(self) -> float:
        """Share of the total that attention and search take."""
        return (self.attention + self.search) / self.total

    def __add__(self, other: "Seconds") -> "Seconds":
        """One after the other."""
        return Seconds(
            linear=self.linear + other.linear,
            attention=self.attention + other.attention,
            search=self.search + other.search,
            moved=self.moved + other.moved,
            calls=self.calls + other.calls,
            overlap=self.overlap or other.overlap,
        )


def predict(shape: Shape, work: Work, machine: Machine) -> Seconds:
    """Seconds of ``work`` on ``machine``.

    Args:
        shape: of the model that the work is of.
        work: of `prefill`, `decode` or `generation`.
        machine: measured, in the dtype of the shape.

    Raises:
        InputError: if the machine was not measured in that dtype.
    """
    rates = machine.of(shape.dtype)
    if work.text:
        attention = work.attention.flops / interpolate(rates.prefill_attention, work.text)
    else:
        attention = _reading(work.attention, shape.itemsize, rates)
        attention += (
            _reading(work.listed, shape.itemsize, rates) * interpolate(rates.decode_bytes, 2) / rates.listed_bytes
        )
    return Seconds(
        linear=work.linear.flops / interpolate(rates.products, work.rows),
        attention=attention,
        search=max(work.search.num_bytes / machine.bandwidth, work.search.flops / rates.arithmetic)
        + work.searches * _SEARCH_CALLS * machine.call_seconds,
        moved=work.moved / rates.moved_bytes,
        calls=work.passes * rates.forward_seconds + work.layers * rates.layer_seconds,
        overlap=machine.device != "cpu",
    )


def total_seconds(shape: Shape, works: Iterable[Work], machine: Machine) -> Seconds:
    """Seconds of several pieces of work, one after the other."""
    found = Seconds(overlap=machine.device != "cpu")
    for work in works:
        found += predict(shape, work, machine)
    return found


def eflops(work: Work, intensity: float, *, weights: bool = False) -> float:
    """The paper's cost: operations, and the bytes of keys and values times the operations that one byte stands for.

    Args:
        work: of `decode`, as in the paper, where prefill does not count.
        intensity: operations a byte, such as `B200_INTENSITY` or ``machine.intensity(dtype)``.
        weights: whether the bytes of the weights count. The paper leaves them out: they are shared by a large batch.
    """
    check_range("eflops", "intensity", intensity, 0, open_high=True)
    num_bytes = work.reading.num_bytes + (work.linear.num_bytes if weights else 0)
    return work.flops + intensity * num_bytes


def attention_ratio(shape: Shape, *, prompt: int, generate: int, intensity: float = B200_INTENSITY) -> float:
    """The paper's ``Phi``: cost of attention over that of the parameters, of one long answer, with many to a prompt.

    Args:
        shape: of the model.
        prompt: the paper's ``L_in``, whose reading is shared.
        generate: the paper's ``L_out``.
        intensity: operations a byte.
    """
    check_range("attention_ratio", "prompt", prompt, 0)
    check_range("attention_ratio", "generate", generate, 1)
    scale = intensity * shape.itemsize / 2  # the paper's D counts elements of two bytes
    read = 2 * shape.group * prompt + (shape.group + scale) * generate
    return read * shape.cache / (2 * (shape.linear + shape.head))


def crossover(
    shape: Shape, machine: Machine, *, batch: int = 1, reading: Reading | None = None, longest: int = 2**24
) -> int | None:
    """The context from which on a decode step spends more seconds on attention, search included, than on the rest.

    Args:
        shape: of the model.
        machine: measured.
        batch: sequences of a step.
        reading: which keys a step reads; None is all.
        longest: contexts above are not looked at.

    Returns:
        Tokens cached; None where attention stays below up to ``longest``, as it does with a window or a small budget.
    """

    def dominates(context: int) -> bool:
        found = predict(shape, decode(shape, context, batch=batch, reading=reading), machine)
        return found.attention_share > 0.5

    if not dominates(longest):
        return None
    low, high = -1, longest  # attention never shrinks with the context
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if dominates(middle) else (middle, high)
    return high


def _reading(amount: Amount, itemsize: int, rates: Rates) -> float:
    """Seconds of single queries over a long cache: the more of them share a key, the longer its bytes take."""
    if not amount.num_bytes:
        return 0.0
    group = amount.flops * itemsize / (2 * amount.num_bytes)
    most = max(rates.decode_bytes)
    return amount.num_bytes / interpolate(rates.decode_bytes, group) * max(1.0, group / most)
