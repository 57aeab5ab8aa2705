"""Benchmarks: our kernels against dense and against peers, in turns in one process, as ratios."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

BENCHES: dict[str, str] = {
    "activations": "decoding of a wide model with sparse activations, thresholds included, against the dense model",
    "attention": "sparse attention over given patterns, prefill, training and decoding, against SDPA and FlexAttention",
    "codes": "sparse codes times a dictionary, with and without gradients, against embedding_bag and dense products",
    "convnet": "whole ConvNets with sparse 1x1 convolutions against dense ones in their faster layout",
    "decode": "decoding from a long cache with a policy, selection included, against dense attention",
    "dictionary": "training, encoding and sweeps of dictionaries, against SAELens and overcomplete",
    "evict": "caches cut after a prompt, in quality, time and bytes, against kvpress and the dense model",
    "linear": "sparse-input and packed linears at batch 1 against F.linear",
    "packed": "decoding of a 125 M-parameter Llama with packed 2:4 and 60 % sparse weights, against the dense model",
    "prefill": "prefill of the embedded model with a policy, selection included, against the dense model",
    "prune": "pruning a model of 125 million weights with Wanda and SparseGPT, against llm-compressor",
    "select": "top-k and statistical top-k of long rows against torch.topk",
    "spmm": "1x1 convolutions with sparse weights against conv2d",
}


@dataclass(frozen=True)
class BenchRow:
    """One comparison.

    Args:
        bench: name of the row.
        size: what was computed.
        ours: what of ours was timed.
        baseline: what it was timed against: of several, the one that was fastest here.
        seconds: our median.
        baseline_seconds: the baseline's median.
        limit_ratio: the ratio that the bytes moved or the arithmetic left would allow: for a kernel at the machine's
            measured bandwidth and dense matrix products, for a whole model at its own dense speed.
    """

    bench: str
    size: str
    ours: str
    baseline: str
    seconds: float
    baseline_seconds: float
    limit_ratio: float

    @property
    def ratio(self) -> float:
        """Baseline over ours: more is better."""
        return self.baseline_seconds / self.seconds

    def to_json(self) -> dict[str, Any]:
        """The fields and the ratio."""
        fields = asdict(self)
        return fields | {"ratio": self.ratio, "limit_ratio": fields.pop("limit_ratio")}


def run_bench(name: str) -> list[BenchRow]:
    """Run the benchmark called ``name``, one of `BENCHES`."""
    module = importlib.import_module(f"{__name__}.{name}")
    rows: list[BenchRow] = module.run()
    return rows


def kernel_row(
    bench: str,
    size: str,
    ours: Callable[[], object],
    baselines: Mapping[str, Callable[[], object]],
    *,
    how: str,
    least_seconds: float,
    repeats: int = 15,
) -> BenchRow:
    """Time one kernel and all its baselines in turns.

    Args:
        bench: name of the row.
        size: what is computed.
        ours: runs the kernel.
        baselines: run the dense computation and peers, by name; the fastest counts.
        how: what ``ours`` does.
        least_seconds: what the machine would need at its best.
        repeats: rounds.
    """
    from ..measure.cost import time_interleaved

    timings = time_interleaved({"ours": ours, **baselines}, repeats=repeats, warmup=2).timings
    fastest = min(baselines, key=lambda name: timings[name].median)
    seconds = timings[fastest].median
    return BenchRow(bench, size, how, fastest, timings["ours"].median, seconds, seconds / least_seconds)
