"""What this machine can do at most, measured in the same process: the limit that kernels are held against."""

import functools
import time
from collections.abc import Callable

import torch

_DENSE = 2048
_READ_BYTES = 512 * 2**20


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
