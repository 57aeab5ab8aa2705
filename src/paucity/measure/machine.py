"""What this machine can do, measured: its limits, against which kernels are held, and the rates that models run at.

A limit is the best that is ever reached (`arithmetic`, `bandwidth`). What a model gets is less and depends on shapes:
products of few rows neither read at full bandwidth nor compute at full speed, short attention is slower than long, and
every layer costs calls. A `Machine` holds these rates; `probes.measure_machine` measures them, and `paucity.kinetics`
predicts with them.
"""

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..checks import check_choice, fail

_Rate = Field(gt=0, allow_inf_nan=False)
Curve = Annotated[dict[Annotated[int, Field(ge=1)], Annotated[float, _Rate]], Field(min_length=1)]
"""Rates at measured points; `interpolate` reads between them."""

_DENSE = 2048
_READ_BYTES = 512 * 2**20


class Rates(BaseModel):
    """What is reached in one dtype.

    Attributes:
        products: FLOP/s of matrix products by their rows, the weights coming from memory.
        prefill_attention: FLOP/s of causal attention, visible pairs alone counted, by the length of the text.
        decode_bytes: bytes of keys and values a second that single queries read of a long cache, by the queries that
            share a key: with many, arithmetic takes longer than memory. Of keys 128 wide; narrower ones, eight or more
            queries to each, are read up to a third slower on a CPU.
        listed_bytes: the same on listed pages of 16, where two share a key.
        moved_bytes: bytes a second that operators between the products read and write.
        layer_seconds: of one layer of a decoder run through transformers, besides its products: calls, whose code and
            data the weights have driven out of the processor's caches, and threads that wake up.
        forward_seconds: of what a forward pass does besides its layers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    products: Curve
    prefill_attention: Curve
    decode_bytes: Curve
    listed_bytes: float = _Rate
    moved_bytes: float = _Rate
    layer_seconds: float = Field(ge=0, allow_inf_nan=False)
    forward_seconds: float = Field(ge=0, allow_inf_nan=False)

    @property
    def arithmetic(self) -> float:
        """FLOP/s of products of many rows: the best measured."""
        return max(self.products.values())


class Machine(BaseModel):
    """A machine as measured.

    Attributes:
        name: of its processor or GPU.
        device: ``cpu`` or ``cuda``.
        threads: of the CPU, that took part.
        bandwidth: bytes a second read from memory by a plain stream.
        call_seconds: of one small operator, called from Python.
        rates: by dtype.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    device: str
    threads: int = Field(ge=1)
    bandwidth: float = _Rate
    call_seconds: float = Field(ge=0, allow_inf_nan=False)
    rates: dict[str, Rates] = Field(min_length=1)

    def intensity(self, dtype: str) -> float:
        """FLOP that products do while one byte is read: the paper's ``I`` of Kinetics, here of this machine."""
        return self.of(dtype).arithmetic / self.bandwidth

    def of(self, dtype: str) -> Rates:
        """The rates in ``dtype``; InputError where it was not measured."""
        check_choice("Machine", "dtype", dtype, self.rates)
        return self.rates[dtype]

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads, whole or not at all."""
        target = Path(path)
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, target)

    @classmethod
    def load(cls, path: str | Path) -> "Machine":
        """A machine that was saved.

        Raises:
            InputError: if there is no such file, or it holds something else.
        """
        constraint = "be a file of `paucity info --measure --out`"
        if not Path(path).is_file():
            raise fail("Machine", "path", constraint, path)
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("text",), "msg": "no UTF-8"}
            where = ".".join(map(str, first["loc"])) or "JSON"
            raise fail("Machine", "path", constraint, f"{path} ({where}: {first['msg']})") from error


def interpolate(curve: Mapping[int, float], at: float) -> float:
    """The rate at ``at``, on straight lines through the logarithms; outside of the curve that of its nearer end."""
    points = sorted(curve.items())
    if at <= points[0][0]:
        return points[0][1]
    for (low, slow), (high, fast) in itertools.pairwise(points):
        if at <= high:
            share = math.log(at / low) / math.log(high / low)
            return math.exp((1 - share) * math.log(slow) + share * math.log(fast))
    return points[-1][1]


def norm_bytes(item: int) -> int:
    """Bytes that a norm of transformers' Llama reads and writes of one element of ``item`` bytes.

    To float32 and back where it is none, a square, a mean, two products.
    """
    return 6 * item + 28 if item < 4 else 7 * item


@functools.cache
def arithmetic(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large dense matrix product in ``dtype``."""
    a, b = (torch.randn(_DENSE, _DENSE).to(dtype) for _ in range(2))
    return 2 * _DENSE**3 / _shortest(lambda: a @ b)


@functools.cache
def bandwidth() -> float:
    """Bytes a second read from a buffer far larger than the caches, by all threads."""
    buffer = torch.ones(_READ_BYTES // 8, dtype=torch.float32).view(2, -1)
    vector = torch.ones(buffer.shape[1])
    return _READ_BYTES / 2 / min(_shortest(lambda: buffer @ vector), _shortest(buffer.sum))


def least_seconds(*, flops: float, num_bytes: float, dtype: torch.dtype) -> float:
    """The longer of doing the arithmetic and of moving the bytes once, at the machine's best."""
    return max(flops / arithmetic(dtype), num_bytes / bandwidth())


def _shortest(call: Callable[[], object], rounds: int = 9) -> float:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
