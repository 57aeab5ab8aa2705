"""Measuring a `Machine`: every rate at a shape of its own, in rounds that take turns; the shortest time counts."""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_int, fail
from ..kernels.cpu import cpu_name
from ..kernels.decode import decode_attention
from .dense import decode_step, random_llama
from .machine import Machine, Rates, norm_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Dtypes that can be measured."""

_STREAM = 64 * 2**20  # float32 numbers
_MATRIX, _MATRICES = 2048, 12  # together larger than the caches
_ROWS, _FEW = (1, 2, 4, 8, 16, 32, 64, 256, 1024), 32  # from so many rows on two matrices are enough
_LENGTHS = (256, 1024, 4096)
_KEYS, _PAGE, _LISTED = 32768, 16, 0.1
_GROUPS = (1, 2, 4, 8, 16, 32)
_TOKENS, _WIDTH = 2048, 1024
_LAYERS = (4, 16)
_LLAMA = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 64,
}
_CALLS = 100


def measure_machine(
    dtypes: tuple[str, ...] = ("bfloat16", "float32"),
    *,
    device: str = "cpu",
    rounds: int = 5,
    on_progress: Callable[[int, int], object] | None = None,
) -> Machine:
    """Measure this machine, in about ten seconds on two cores.

    On a GPU the same calls are timed there; none has been tried.

    Args:
        dtypes: of `DTYPES`, those to measure.
        device: ``cpu`` or ``cuda``.
        rounds: in which everything is measured once.
        on_progress: called with (rounds done, rounds in all).

    Raises:
        InputError: if a dtype is unknown, none is named, or the device is not there.
    """
    check_int("measure_machine", "rounds", rounds)
    probes = Probes(dtypes, device=device)
    for done in range(rounds):
        probes.round()
        if on_progress is not None:
            on_progress(done + 1, rounds)
    return probes.machine()


class Probes:
    """Everything that is timed for a `Machine`, round by round, so that other work can take its turn between rounds."""

    def __init__(self, dtypes: tuple[str, ...], *, device: str = "cpu") -> None:
        for dtype in dtypes:
            check_choice("measure_machine", "dtypes", dtype, DTYPES)
        if not dtypes:
            raise fail("measure_machine", "dtypes", f"name at least one of {', '.join(DTYPES)}", "none")
        check_choice("measure_machine", "device", device, ("cpu", "cuda"))
        if device == "cuda" and not torch.cuda.is_available():
            raise fail("measure_machine", "device", "be a device of this machine", device)
        self.dtypes, self.device = dtypes, device
        self.seconds: dict[tuple[str, str], float] = {}
        stream = torch.ones(2, _STREAM // 2, device=device)
        vector, small = torch.ones(_STREAM // 2, device=device), torch.ones(8, device=device)
        self.calls: dict[tuple[str, str], Callable[[], object]] = {
            ("", "product"): lambda: stream @ vector,
            ("", "sum"): stream.sum,
            ("", "call"): lambda: [small + small for _ in range(_CALLS)],
        }
        for dtype in dtypes:
            made = _calls(DTYPES[dtype], device)
            self.calls |= {(dtype, name): call for name, call in made.items()}

    def round(self) -> None:
        """Time everything once; the first round warms up as well."""
        with torch.no_grad():
            for name, call in self.calls.items():
                if name not in self.seconds:
                    call()
                self._wait()
                started = time.perf_counter()
                call()
                self._wait()
                elapsed = time.perf_counter() - started
                self.seconds[name] = min(elapsed, self.seconds.get(name, elapsed))

    def machine(self) -> Machine:
        """What the rounds so far have shown."""
        if not self.seconds:
            raise fail("Probes", "rounds", "be at least 1", 0)
        return Machine(
            name=torch.cuda.get_device_name() if self.device == "cuda" else cpu_name(),
            device=self.device,
            threads=torch.get_num_threads(),
            bandwidth=4 * _STREAM / min(self.seconds["", "product"], self.seconds["", "sum"]),
            call_seconds=self.seconds["", "call"] / _CALLS,
            rates={dtype: self._rates(dtype) for dtype in self.dtypes},
        )

    def _rates(self, dtype: str) -> Rates:
        seconds = {name: value for (owner, name), value in self.seconds.items() if owner == dtype}
        item = DTYPES[dtype].itemsize
        call = seconds["decode call"]

        def beyond(name: str) -> float:
            """Seconds that were not the call."""
            return max(seconds[name] - call, seconds[name] / 2)

        products = {rows: 2 * rows * _MATRIX**2 * _matrices(rows) / seconds[f"rows {rows}"] for rows in _ROWS}
        few, many = _LAYERS
        layer = (seconds[f"layers {many}"] - seconds[f"layers {few}"]) / (many - few)
        beside = max(0.0, layer - 2 * _layer_elements() / products[min(products)])
        return Rates(
            products=products,
            prefill_attention={
                length: 2 * 4 * 64 * length * (length + 1) / seconds[f"length {length}"] for length in _LENGTHS
            },
            decode_bytes={group: 2 * 8 * 128 * _KEYS * item / beyond(f"group {group}") for group in _GROUPS},
            listed_bytes=2 * 8 * 128 * _listed() * _PAGE * item / beyond("listed"),
            moved_bytes=_TOKENS * _WIDTH * (norm_bytes(item) + 3 * item) / seconds["moved"],
            layer_seconds=beside,
            forward_seconds=max(0.0, seconds[f"layers {few}"] - few * layer),
        )

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _layer_elements() -> int:
    """Of the matrices of one layer of the Llama that is timed."""
    hidden, heads = _LLAMA["hidden_size"], _LLAMA["num_attention_heads"] + _LLAMA["num_key_value_heads"]
    return hidden * (2 * heads * _LLAMA["head_dim"] + 3 * _LLAMA["intermediate_size"])


def _matrices(rows: int) -> int:
    return _MATRICES if rows < _FEW else 2


def _listed() -> int:
    return max(1, round(_LISTED * _KEYS / _PAGE))


def _calls(dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    """The calls of one dtype, by name."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    first = draw(_MATRIX, _MATRIX)
    weights = [first.clone() for _ in range(_MATRICES)]
    query, key, value = draw(1, 16, 1, 128), draw(1, 8, _KEYS, 128), draw(1, 8, _KEYS, 128)
    pages = torch.rand(1, 8, _KEYS // _PAGE, generator=generator).topk(_listed()).indices.int().to(device)
    calls: dict[str, Callable[[], object]] = {}
    for rows in reversed(_ROWS):
        calls[f"rows {rows}"] = partial(_products, draw(rows, _MATRIX), weights[: _matrices(rows)])
    # After all matrices of the last product no cache of the processor holds the pages.
    calls["listed"] = partial(decode_attention, query, key, value, pages, page_size=_PAGE)
    for group in _GROUPS:
        calls[f"group {group}"] = partial(decode_attention, draw(1, 8 * group, 1, 128), key, value)
    calls["decode call"] = partial(decode_attention, query, key[:, :, :16], value[:, :, :16])
    for length in _LENGTHS:
        text = draw(1, 4, length, 64), draw(1, 2, length, 64), draw(1, 2, length, 64)
        calls[f"length {length}"] = partial(F.scaled_dot_product_attention, *text, is_causal=True, enable_gqa=True)
    calls["moved"] = partial(_norm, draw(_TOKENS, _WIDTH), draw(_WIDTH))
    for layers in _LAYERS:
        model = random_llama(dtype, context=64, num_hidden_layers=layers, **_LLAMA).to(device)
        calls[f"layers {layers}"] = decode_step(model, 16)
    return calls


def _products(rows: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        F.linear(rows, weight)


def _norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """A norm as transformers' Llama has it, and a residual."""
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return hidden + weight * wide.to(hidden.dtype)
