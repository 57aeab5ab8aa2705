"""A machine of round numbers, and a shape to count by hand."""

import pytest

from paucity.kinetics import Shape
from paucity.measure.machine import Machine, Rates


@pytest.fixture
def shape():
    """Three layers, the middle one with a window of 5."""
    return Shape(
        name="hand", parameters=1000, linear=700, head=200, hidden=8, inner=16, heads=4, kv_heads=2, dim=2,
        value_dim=3, windows=(None, 5, None),
    )  # fmt: skip


@pytest.fixture
def machine():
    """A machine that reads 100 bytes a second; rates differ so that each can be told."""
    rates = Rates(
        products={1: 10.0, 100: 1000.0},
        prefill_attention={1: 50.0, 100: 50.0},
        decode_bytes={1: 80.0, 2: 80.0, 8: 20.0},
        listed_bytes=40.0,
        moved_bytes=20.0,
        layer_seconds=0.5,
        forward_seconds=0.25,
    )
    return Machine(
        name="abacus", device="cpu", threads=1, bandwidth=100.0, call_seconds=0.125, rates={"bfloat16": rates}
    )
