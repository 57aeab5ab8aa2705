import io
import json
import math
from datetime import UTC, datetime, timedelta, timezone

import pytest
from pydantic import ValidationError
from rich.console import Console

from paucity.checks import InputError
from paucity.report import Measurement, Report, console_table, environment, verdict
from paucity.report.compare import rows


def test_round_trip_keeps_everything_and_leaves_no_other_file(make_report, make_measurement, tmp_path):
    path = tmp_path / "report.json"
    report = make_report(sparse=make_measurement(perplexity=math.inf))
    report.write(path)
    report.write(path)
    assert Report.read(path) == report
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
    data = json.loads(path.read_text())
    asked = ("bits_per_byte", "passkey_accuracy", "prefill_ms", "decode_ms_per_token", "peak_memory_mb", "flops")
    assert all(data[side][key] is not None for side in ("dense", "sparse") for key in (*asked, "density"))
    assert data["schema_version"] == 1
    assert data["sparse"]["perplexity"] == "Infinity"


def test_a_failed_write_leaves_the_old_file(make_report, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    make_report(title="old").write(path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make_report(title="new").write(path)
    assert Report.read(path).title == "old"


def test_created_is_utc(make_report):
    there = datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    report = make_report(created=there)
    assert report.created.tzinfo == UTC
    assert '"created":"2025-12-31T23:00:00Z"' in report.model_dump_json()
    with pytest.raises(ValidationError, match="timezone"):
        make_report(created=datetime(2026, 1, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"schema_version": 2, "unknown": 1}',
            r"report: schema_version must be at most 1 \(a newer paucity .* got 2\.",
        ),
        ('{"schema_version": 1}', "must be a valid report, got title: Field required"),
        ('{"schema_version": true}', "with a schema_version, got True"),
        ("{}", "with a schema_version, got None"),
        ("[1]", "with a schema_version, got None"),
        ('{"schema_version": 1', "must be valid JSON"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        Report.read(path)
    assert "\n" not in str(caught.value)


def test_absent_file_unknown_key_and_ragged_heads_are_refused(make_report, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Report.read(tmp_path / "none.json")
    with pytest.raises(ValidationError, match="unknown"):
        make_report(unknown=1)
    with pytest.raises(ValidationError, match="as many heads"):
        make_report(head_density=[[0.1], [0.1, 0.2]])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bits_per_byte": 1.021}, "Sparse keeps bits per byte within 5 % of dense (+2.1 %)."),
        ({"bits_per_byte": 1.05}, "Sparse keeps bits per byte within 5 % of dense (+5.0 %)."),
        ({"bits_per_byte": 1.093}, "Sparse does not keep bits per byte within 5 % of dense (+9.3 %)."),
        ({"bits_per_byte": math.nan}, "Sparse does not keep bits per byte within 5 % of dense (not a number)."),
        (
            {"prefill_ms": 500.0, "prefill_ms_low": 490.0, "prefill_ms_high": 510.0},
            "Prefill at 4,096 tokens is faster: 2.00 times the speed of dense.",
        ),
        (
            {"prefill_ms": 1250.0, "prefill_ms_low": 1240.0, "prefill_ms_high": 1260.0},
            "Prefill at 4,096 tokens is not faster: 0.80 times the speed of dense.",
        ),
        (
            {"prefill_ms": 995.0, "prefill_ms_high": 1100.0},
            "Prefill at 4,096 tokens is not measurably faster or slower: "
            "1.01 times the speed of dense, within the noise.",
        ),
        (
            {"prefill_ms": 975.0, "prefill_ms_low": 974.0, "prefill_ms_high": 976.0},  # less than a run repeats itself
            "Prefill at 4,096 tokens is not measurably faster or slower: "
            "1.03 times the speed of dense, within the noise.",
        ),
        (
            {"prefill_ms": 500.0, "prefill_ms_low": 490.0, "prefill_ms_high": 1200.0},  # one slow round
            "Prefill at 4,096 tokens is faster: 2.00 times the speed of dense.",
        ),
        ({"decode_ms_per_token": 8.0}, "Decoding is not faster: 1.00 times the speed of dense."),
        ({"flops": 3e10}, "One prefill executes 50 % of the FLOPs of dense."),
        ({"passkey_accuracy": 0.98}, "Passkey accuracy at 4,096 tokens stays at 98 %."),
    ],
)
def test_verdict(make_measurement, changes, sentence):
    assert sentence in verdict(make_measurement(), make_measurement(**changes))


def test_passkey_verdict_knows_the_intervals(make_measurement, make_retrieval):
    dense = make_measurement()
    near = make_measurement(passkey_accuracy=0.96, retrieval=make_retrieval(0.96))
    far = make_measurement(passkey_accuracy=0.5, retrieval=make_retrieval(0.5))
    assert "Passkey accuracy at 4,096 tokens falls from 98 % to 96 % (within the intervals)." in verdict(dense, near)
    assert "Passkey accuracy at 4,096 tokens falls from 98 % to 50 %." in verdict(dense, far)


def test_verdict_is_filled_in_and_silent_on_what_was_not_measured(make_report, bare_report):
    report = make_report()
    assert report.verdict == verdict(report.dense, report.sparse) != []
    assert bare_report.verdict == []


def test_rows_judge_by_direction_and_noise(make_report, make_measurement, make_retrieval):
    sparse = make_measurement(
        bits_per_byte=1.1,
        prefill_ms=995.0,
        flops=3e10,
        peak_memory_mb=800.1,
        retrieval=make_retrieval(0.4, "key_value"),
    )
    found = {row.label: row for row in rows(make_report(sparse=sparse))}
    assert (found["Bits per byte"].change, found["Bits per byte"].judgement) == ("+10.0 %", "worse")
    assert found["Prefill, 4,096 tokens"].judgement == "within noise"
    assert found["Work of a prefill, 4,096 tokens"].judgement == "better"
    assert (found["Peak memory"].change, found["Peak memory"].judgement) == ("0.0 %", "same")
    assert (found["Key value, 4,096 tokens"].change, found["Key value, 4,096 tokens"].judgement) == (
        "−50.0 points",
        "worse",
    )
    assert rows(make_report(dense=Measurement(), sparse=Measurement(), attention=[])) == []


def test_console_table_fits_80_columns_without_markup_or_colour(make_report):
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(console_table(make_report(title="[red]a[/red]")))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "[red]a[/red]" in text
    assert "…" not in text
    assert any(
        "1,000 ms" in line and "700 ms" in line and "−30.0 %" in line and "better" in line for line in text.splitlines()
    )


def test_environment_is_of_this_process():
    import torch

    facts = environment()
    assert facts.torch == torch.__version__
    assert facts.threads == torch.get_num_threads()
    assert facts.cpu
