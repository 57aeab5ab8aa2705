"""Claims on lottery tickets: their verdicts follow from the figures, and they say what they measured on."""

import pytest

from paucity.claims import lottery_rewind, lottery_transfer_calibration, run_claim
from paucity.claims.tickets import net, source, trainer
from paucity.weights.iterative import Phase


@pytest.fixture
def digits(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.delenv("PAUCITY_DATA", raising=False)


def test_without_the_data_digits_are_used_and_it_is_said(digits):
    images = source(300, 100)
    assert (images.name, images.shape, len(images.trained), len(images.tested)) == ("digits", (1, 8, 8), 300, 100)
    assert images.note.startswith("measured on digits instead: data_file: PAUCITY_DATA is not set")
    record = trainer(images, epochs=2, seed=0)(net(images, seed=0), Phase(0, None))
    assert set(record) == {"accuracy", "calibration_error"}


def test_a_transfer_needs_a_target(digits, monkeypatch):
    monkeypatch.setattr(lottery_transfer_calibration, "TARGETS", ("mnist",))
    with pytest.raises(FileNotFoundError, match="no target images: mnist: data_file: PAUCITY_DATA is not set"):
        run_claim("lottery-transfer-calibration", quick=True)


@pytest.mark.parametrize(
    ("ticket", "reinitialised", "holds"), [(0.8, 0.7, True), (0.8, 0.8, False), (0.7, 0.8, False), (0.55, 0.5, False)]
)
def test_a_ticket_must_beat_both_controls(digits, monkeypatch, ticket, reinitialised, holds):
    figures = {"dense": 0.9, "ticket": ticket, "random_mask": 0.6, "reinitialised": reinitialised, "one_shot": 0.7}
    monkeypatch.setattr(lottery_rewind, "_draw", lambda *_, **__: figures)
    result = run_claim("lottery-rewind", quick=True)
    assert result.holds is holds
    assert result.measured["ticket_less_control"]["reinitialised"] == [ticket - reinitialised]
    assert "digits" in result.settings["note"]


def row(sparsity, upstream, probed, prompted, prompted_accuracy):
    return {
        "sparsity": sparsity,
        "source": {"accuracy": upstream},
        "mnist": {
            "linear_probe": {"accuracy": 0.7, "calibration_error": probed},
            "visual_prompt": {"accuracy": prompted_accuracy, "calibration_error": prompted},
        },
    }


@pytest.mark.parametrize(
    ("probed", "prompted", "accuracy", "upstream", "holds"),
    [
        (0.10, 0.20, 0.3, 0.80, True),
        (0.04, 0.20, 0.3, 0.80, False),  # better calibrated than the dense one when probed
        (0.10, 0.20, 0.5, 0.80, False),  # loses nothing
        (0.10, 0.20, 0.3, 0.70, False),  # loses, but was worse on the source
    ],
)
def test_calibration_and_loss_decide(digits, monkeypatch, probed, prompted, accuracy, upstream, holds):
    table = [row(0.0, 0.8, 0.05, 0.1, 0.5), row(0.5, upstream, probed, prompted, accuracy)]
    table.append(row(0.75, upstream, probed + 0.01, prompted + 0.01, accuracy))
    monkeypatch.setattr(lottery_transfer_calibration, "_targets", lambda *_: ({"mnist": ()}, []))
    monkeypatch.setattr(lottery_transfer_calibration, "_table", lambda *_, **__: table)
    result = run_claim("lottery-transfer-calibration", quick=True)
    assert result.holds is holds
    assert result.measured["dense_better_calibrated"]["visual_prompt"] == "2 of 2"
