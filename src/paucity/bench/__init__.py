"""Benchmarks: our kernels against dense and against peers, in turns in one process, as ratios."""

import importlib
from dataclasses import asdict, dataclass
from typing import Any

BENCHES: dict[str, str] = {
    "attention": "sparse attention over given patterns against causal SDPA",
    "prefill": "prefill of the embedded model with a policy, selection included, against the dense model",
}


@dataclass(frozen=True)
class BenchRow:
    """One comparison.

    Args:
        bench: name of the row.
        size: what was computed.
        ours: what of ours was timed.
        baseline: what it was timed against.
        seconds: our median.
        baseline_seconds: the baseline's median.
        limit_ratio: the ratio that the arithmetic left would allow at the baseline's speed.
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
