"""Invented reports: for tests of reading, writing and drawing only."""

from collections.abc import Callable
from typing import Any

import pytest

from paucity.report import (
    AttentionLayer,
    Environment,
    Measurement,
    ModelFacts,
    PrefillTime,
    Report,
    Retrieval,
    StepRecord,
    TextFacts,
    TextUse,
    picture_png,
)

ENVIRONMENT = Environment(paucity="0.1.0", python="3.11", torch="2.13", transformers="5.0", cpu="an x86", threads=2)
SITES = [f"model.layers.{layer}.mlp.{kind}.weight" for layer in range(3) for kind in ("up_proj", "down_proj")]


def _retrieval(accuracy: float, task: str = "passkey", margin: float = 0.02) -> list[Retrieval]:
    interval = {"low": max(0.0, accuracy - margin), "high": min(1.0, accuracy + margin)}
    return [Retrieval(task=task, length=n, accuracy=accuracy, num_prompts=50, **interval) for n in (1024, 4096)]


def _measured(**changes: Any) -> Measurement:
    fields: dict[str, Any] = {
        "bits_per_byte": 1.0,
        "bits_per_byte_low": 0.9,
        "bits_per_byte_high": 1.1,
        "perplexity": 10.0,
        "passkey_accuracy": 0.98,
        "retrieval": _retrieval(0.98) + _retrieval(0.9, "key_value"),
        "prefill_tokens": 4096,
        "prefill_ms": 1000.0,
        "prefill_ms_low": 990.0,
        "prefill_ms_high": 1010.0,
        "prefill_ms_by_length": [PrefillTime(tokens=512, ms=100), PrefillTime(tokens=4096, ms=1000)],
        "decode_ms_per_token": 8.0,
        "peak_memory_mb": 800.0,
        "flops": 6e10,
        "density": dict.fromkeys(SITES, 1.0),
    }
    return Measurement(**fields | changes)


def _report(**changes: Any) -> Report:
    sparse = {"prefill_ms": 700.0, "prefill_ms_low": 690.0, "prefill_ms_high": 710.0, "bits_per_byte": 1.021}
    fields: dict[str, Any] = {
        "title": "A title",
        "seconds": 143.0,
        "recipe": {"model": "embedded", "steps": [{"method": "wanda", "sparsity": 0.5}]},
        "environment": ENVIRONMENT,
        "model": ModelFacts(source="embedded", architecture="Llama", num_parameters=5_500_000, dtype="bfloat16"),
        "text": TextUse(evaluated=TextFacts(names=["held_out_python"], tokens=65536, bytes=200_000)),
        "dense": _measured(),
        "sparse": _measured(**sparse, flops=4e10, density=dict.fromkeys(SITES, 0.5)),
        "steps": [StepRecord(method="wanda", family="weights", options={"sparsity": 0.5}, density=0.5, seconds=3.0)],
        "head_density": [[0.1, 0.5], [None, 1.0]],
        "attention": [
            AttentionLayer(
                layer=layer,
                tokens=4096,
                density=[0.1, 0.5],
                recall=[0.9, 0.95] if layer else None,
                output_error=[0.05, 0.02],
                select_ms=2.0,
                sparse_ms=50.0,
                dense_ms=250.0,
                pictures=[picture_png([[1.0, float("nan")], [0.0, 0.5]])] * 2 if layer else [],
            )
            for layer in (0, 1)
        ],
    }
    return Report(**fields | changes)


def _bare() -> Report:
    """A report in which nothing was measured."""
    empty = Measurement()
    return _report(dense=empty, sparse=empty, steps=[], recipe={}, text=TextUse(), head_density=None, attention=[])


@pytest.fixture(scope="session")
def make_retrieval() -> Callable[..., list[Retrieval]]:
    return _retrieval


@pytest.fixture(scope="session")
def make_measurement() -> Callable[..., Measurement]:
    return _measured


@pytest.fixture(scope="session")
def make_report() -> Callable[..., Report]:
    return _report


@pytest.fixture(scope="session")
def bare_report() -> Report:
    return _bare()
