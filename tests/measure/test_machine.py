"""The machine is measured at sizes that take no time, saved and read back; what is no machine is refused."""

import json

import pytest

from paucity.checks import InputError
from paucity.measure.machine import Machine, interpolate
from paucity.measure.probes import Probes, measure_machine


def test_every_rate_is_there_and_survives_saving(small_probes, tmp_path):
    rounds = []
    machine = measure_machine(("bfloat16", "float32"), rounds=2, on_progress=lambda *done: rounds.append(done))
    assert rounds == [(1, 2), (2, 2)]
    assert set(machine.rates) == {"bfloat16", "float32"}
    assert set(machine.of("float32").products) == {1, 4, 64}
    assert machine.intensity("float32") == max(machine.of("float32").products.values()) / machine.bandwidth
    machine.save(tmp_path / "machine.json")
    assert Machine.load(tmp_path / "machine.json") == machine
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]


def test_rates_are_work_over_seconds(small_probes):
    taken = Probes(("float32",))
    taken.seconds = dict.fromkeys(taken.calls, 2.0) | {("float32", "decode call"): 0.5}
    elements = 16 * (2 * 16 + 2 * 8 + 3 * 24)
    layer = 0.25 + 2 * elements / (2 * 256 * 3 / 2)
    taken.seconds |= {("float32", "layers 1"): layer + 0.125, ("float32", "layers 2"): 2 * layer + 0.125}
    machine = taken.machine()
    rates = machine.of("float32")
    assert machine.bandwidth == 4 * 1024 / 2
    assert rates.products == {1: 2 * 256 * 3 / 2, 4: 2 * 4 * 256 * 3 / 2, 64: 2 * 64 * 256 * 2 / 2}
    assert rates.prefill_attention[16] == 4 * 4 * 64 * (16 * 17 / 2) / 2
    assert rates.decode_bytes == {1: 2 * 8 * 128 * 64 * 4 / 1.5, 4: 2 * 8 * 128 * 64 * 4 / 1.5}
    assert rates.layer_seconds == pytest.approx(0.25)
    assert rates.forward_seconds == pytest.approx(0.125)


def test_a_round_keeps_the_shortest(small_probes):
    taken = Probes(("float32",))
    taken.round()
    first = dict(taken.seconds)
    taken.round()
    assert all(taken.seconds[name] <= first[name] for name in first)


def test_interpolation_is_straight_in_the_logarithms():
    curve = {1: 10.0, 100: 1000.0}
    assert interpolate(curve, 10) == pytest.approx(100)
    assert [interpolate(curve, at) for at in (0.5, 1, 100, 1e6)] == pytest.approx([10, 10, 1000, 1000])


def test_bad_input(tmp_path):
    for call, message in (
        (lambda: measure_machine(("int8",)), "dtypes must be one of bfloat16, float16, float32, got int8"),
        (lambda: measure_machine(()), "dtypes must name at least one"),
        (lambda: measure_machine(rounds=0), "rounds must be at least 1"),
        (lambda: measure_machine(device="abacus"), "device must be one of cpu, cuda, got abacus"),
        (lambda: Machine.load(tmp_path / "absent.json"), "path must be a file of `paucity info --measure --out`"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    wrong = tmp_path / "wrong.json"
    for text, message in (("{", "JSON"), (json.dumps({"name": "x"}), "device: Field required")):
        wrong.write_text(text)
        with pytest.raises(InputError, match=message):
            Machine.load(wrong)
