"""Sparse codes times a dictionary: ours against embedding_bag and a dense product."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.codes import decode_codes
from ..measure.machine import least_seconds
from ..ops.formats import Codes
from . import BenchRow, kernel_row

TOKENS, DICT_SIZE, DIM, K = 4096, 16384, 768, 32


def run() -> list[BenchRow]:
    """Decoding alone, and with the gradients to the values and to the dictionary."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(TOKENS, DICT_SIZE, generator=generator).topk(K).indices
    values = torch.rand(TOKENS, K, generator=generator).requires_grad_()
    dictionary = torch.randn(DICT_SIZE, DIM, generator=generator).requires_grad_()
    grad = torch.randn(TOKENS, DIM, generator=generator)
    ways: dict[str, Callable[[], Tensor]] = {
        "embedding_bag": lambda: F.embedding_bag(indices, dictionary, mode="sum", per_sample_weights=values),
        "dense matmul": lambda: Codes(values, indices, DICT_SIZE).to_dense() @ dictionary,
    }

    def ours() -> Tensor:
        return decode_codes(values, indices, dictionary)

    def train(forward: Callable[[], Tensor]) -> None:
        torch.autograd.grad(forward(), (values, dictionary), grad)

    size = f"{TOKENS} tokens, dictionary {DICT_SIZE}→{DIM}, k={K}, fp32"
    moved, flops = dictionary.nbytes + grad.nbytes + 3 * values.nbytes, 2 * TOKENS * K * DIM
    limit = partial(least_seconds, dtype=torch.float32)
    with torch.no_grad():
        decode = kernel_row(
            "codes.decode", size, ours, ways,
            how="decode_codes", least_seconds=limit(flops=flops, num_bytes=moved), repeats=9,
        )  # fmt: skip
    train_row = kernel_row(
        "codes.train",
        f"{size}, gradients to values and dictionary",
        partial(train, ours),
        {name: partial(train, way) for name, way in ways.items()},
        how="decode_codes, forward and backward",
        least_seconds=limit(flops=3 * flops, num_bytes=2 * moved),
        repeats=7,
    )
    return [decode, train_row]
