"""Break-even: what is timed is what is said, and the crossover lies where the times meet."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from paucity import cli
from paucity.checks import InputError
from paucity.kernels.linear import PackedLinear
from paucity.models.load import Loaded
from paucity.models.packed import packed_linears
from paucity.ops.formats import PackedNM
from paucity.weights import break_even
from paucity.weights.break_even import measure_break_even
from paucity.weights.break_even_report import Crossover, advice_of, crossover_density


def test_crossover_is_where_the_times_meet():
    # packed / dense time 0.5 at 0.2, 1.5 at 0.6: equal half way
    assert crossover_density({0.6: 1 / 1.5, 0.2: 2.0}) == pytest.approx(0.4)
    assert crossover_density({0.2: 0.9, 0.5: 0.5}) is None
    assert crossover_density({0.2: 3.0, 0.5: 1.1}) == 1.0
    assert crossover_density({0.1: 0.9, 0.2: 2.0, 0.4: 0.5}) == pytest.approx(0.2 + 0.2 * 0.5 / 1.5)


def test_advice_names_what_gains():
    entry = {"rows": 4, "cols": 4, "dtype": "bfloat16", "batch": 1}
    found = [
        Crossover(**entry, format="bitmask", density=0.5),
        Crossover(**entry, format="bitmask", density=0.7),
        Crossover(**entry, format="nm", density=None),
        Crossover(**entry | {"batch": 4}, format="nm", density=1.0),
        Crossover(**entry | {"batch": 4}, format="bitmask", density=None),
        Crossover(**entry | {"batch": 4}, format="bitmask", density=0.25),
    ]
    assert advice_of(found) == [
        "bfloat16, 1 token at a time: packed is faster below a density of 50% to 70%, by shape (bitmask), "
        "at no density measured (nm).",
        "bfloat16, 4 tokens at a time: packed is faster below a density of 25% (bitmask, 1 of 2 shapes), "
        "below a density of the highest measured (nm).",
    ]


def test_shapes_are_measured_as_asked():
    told = []
    found = measure_break_even(
        [(32, 64), (20, 48)], densities=[0.5, 0.25, 0.4], batches=[1, 3], dtypes=["float32", "bfloat16"],
        repeats=1, cold_bytes=1, on_progress=told.append,
    )  # fmt: skip
    assert told[0] == "32x64 in float32"
    assert found.decoding == ()
    by = {(row.rows, row.dtype, row.batch, row.format, row.density): row for row in found.rows}
    # bitmask at all densities, blocks where they divide, N:M at a half and a quarter
    assert len(by) == len(found.rows) == 2 * 2 * ((3 + 3 + 2) + (3 + 0 + 2))
    row = by[32, "bfloat16", 1, "nm", 0.5]
    assert (row.num_bytes, row.dense_bytes) == (32 * 32 * 2 + 32 * 8, 32 * 64 * 2)
    assert row.speedup == row.dense_seconds / row.seconds > 0
    assert by[32, "float32", 1, "blocks", 0.5].num_bytes == 4 * (16 * 16 * 4 + 4) + 4 * 3
    assert len(found.crossovers) == 2 * 2 * (3 + 2)
    assert len(found.advice) == 4


def test_a_model_decodes_in_turns_and_is_left_alone(tiny_model):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measure_break_even(Loaded(model, None, "tiny"), densities=[0.5], batches=[1], repeats=1, cold_bytes=1)
    shapes = {(32, 32), (16, 32), (48, 32), (32, 48), (64, 32)}
    assert {(row.rows, row.cols) for row in found.rows} == shapes
    assert {row.dtype for row in found.rows} == {"float32"}
    assert [(step.format, step.density) for step in found.decoding] == [("bitmask", 0.5), ("blocks", 0.5), ("nm", 0.5)]
    assert all(step.ms > 0 and step.dense_ms > 0 for step in found.decoding)
    assert not packed_linears(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bad_input_is_refused_before_anything_is_timed():
    for arguments, message in (
        ({"densities": [1.0]}, r"densities must be in \(0, 1\), got 1.0"),
        ({"batches": [0]}, "batches must be at least 1, got 0"),
        ({"dtypes": ["int8"]}, "dtypes must be one of"),
        ({"formats": ["csr"]}, "formats must be one of bitmask, blocks, nm, got csr"),
        ({"densities": []}, "must hold at least one each, got none"),
    ):
        with pytest.raises(InputError, match=message):
            measure_break_even([(16, 16)], **arguments)
    for model in (nn.Sequential(nn.ReLU()), nn.Sequential(PackedLinear(PackedNM.pack(torch.eye(4), 1, 4)))):
        with pytest.raises(InputError, match="target must have linear layers that are not packed, got Sequential"):
            measure_break_even(model)
    for shape, arguments in (
        ((10, 10), {"formats": ["blocks"]}),
        ((64, 64), {"formats": ["nm"], "densities": [0.3]}),
        ((6, 6), {"formats": ["nm", "blocks"], "on_progress": pytest.fail}),
    ):
        with pytest.raises(InputError, match="formats and densities must fit a shape"):
            measure_break_even([shape], **arguments)


def test_a_format_that_fits_nothing_is_named():
    found = measure_break_even([(20, 48)], densities=[0.5], batches=[1], repeats=1, cold_bytes=1)
    assert {row.format for row in found.rows} == {"bitmask", "nm"}
    assert found.advice[1:] == ("blocks was not measured: it fits no shape and density.",)


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(break_even, "COLD_BYTES", 1)
    target = tmp_path / "found.json"
    arguments = ["break-even", "--quick", "--rows", "32", "--cols", "64", "--out", str(target)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "Dense over packed time by density" in result.output
    assert "bfloat16, 16 tokens at a time: packed is faster " in result.output
    rows = json.loads(target.read_text())["rows"]
    assert {(row["batch"], row["density"]) for row in rows} == {(b, d) for b in (1, 16) for d in (0.25, 0.5, 0.75)}
    refused = CliRunner().invoke(cli.app, arguments)
    assert isinstance(refused.exception, InputError)
    assert "--force replaces it" in str(refused.exception)
    result = CliRunner().invoke(cli.app, [*arguments, "--force", "--json", "--format", "nm", "--batch", "2"])
    assert {row["format"] for row in json.loads(result.stdout)["rows"]} == {"nm"}
    for wrong, message in (
        (["--rows", "3"], "--rows and --cols must be given together"),
        (["--density", "2"], r"--density must be in \(0, 1\)"),
        (["--format", "bitmaks"], "did you mean 'bitmask'"),
    ):
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(cli.app, ["break-even", *wrong], catch_exceptions=False)
