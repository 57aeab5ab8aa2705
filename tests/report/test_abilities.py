import pytest

from paucity.report import Ability, Report, render
from paucity.report.abilities import ability_details, ability_picture, ability_rows
from paucity.report.ability import Figure, said


def figure(value, spread=0.1):
    return Figure(value=value, low=value - spread, high=value + spread)


def ability(name, group, was, now, change, **rest):
    fields = {"name": name, "group": group, "title": name.capitalize(), "unit": "share", "num": 200}
    return Ability(**fields | rest, dense=was and figure(was), sparse=figure(now), change=change)


KICK = [
    ability("perplexity", "loss", 9.0, 9.3, Figure(value=0.04, low=0.03, high=0.05), unit="perplexity"),
    ability("knowledge", "knowledge", 0.8, 0.6, figure(-0.4), lost=0.22, gained=0.02, chance=0.25),
    ability("control", "control", 0.4, 0.2, figure(-0.9), chance=0.25),
    ability("open book", "context", 0.9, 0.91, figure(0.01)),
    ability("<b>", "choice", 0.2, 0.2, None, chance=0.25),
    ability("divergence", "agreement", None, 0.05, None, unit="nats"),
]


def test_rows_say_what_changed_and_whether_it_is_noise(make_report):
    rows = ability_rows(make_report(abilities=KICK))
    assert [(row.change, inside, row.judgement) for row, inside in rows] == [
        ("+4.0 %", "+3 to +5", "worse"),
        ("−40.0 %", "−50 to −30", "worse"),
        ("−90.0 %", "−100 to −80", ""),
        ("+1.0 %", "−9 to +11", "within noise"),
        ("–", "", ""),
        ("–", "", ""),
    ]
    assert rows[5][0].dense == "–"
    assert rows[5][0].label == "Divergence, nats"
    assert ability_details(make_report(abilities=KICK))[1] == [
        *("Knowledge", "200", "25 %", "80 % (70–90)", "60 % (50–70)", "22 %", "2 %")
    ]


def test_a_rise_of_accuracy_is_better_and_of_loss_is_worse():
    assert ability("a", "choice", 0.5, 0.9, figure(0.8)).judgement() == "better"
    assert ability("a", "loss", 0.5, 0.9, figure(0.8)).judgement() == "worse"
    assert ability("a", "loss", 0.5, 0.4, figure(-0.2)).judgement() == "better"


def test_the_verdict_names_what_fell(make_report):
    report = make_report(abilities=KICK)
    assert report.verdict[-1] == "Perplexity rises by 4 %; beyond their intervals fall knowledge by 40 %."
    assert said(KICK[:1]) == said(KICK[1:]) == []
    assert said([KICK[0], KICK[3]]) == ["Perplexity rises by 4 %; none of 1 abilities falls beyond its interval."]


def test_the_page_has_a_section_and_a_figure(make_report, tmp_path):
    report = make_report(abilities=KICK)
    report.write(tmp_path / "report.json")
    page = render(Report.read(tmp_path / "report.json"))
    assert 'aria-labelledby="abilities"' in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    (picture,) = ability_picture(report)
    assert "Control" not in picture.svg
    assert "Knowledge 40 %" in picture.svg


def test_without_abilities_nothing_is_shown(make_report, bare_report):
    assert "What perplexity hides" not in render(make_report())
    assert ability_picture(bare_report) == []
    assert ability_picture(make_report(abilities=KICK[:1])) == []


@pytest.mark.parametrize("change", [float("inf"), 40.0, -3.0])
def test_changes_beyond_the_axis_are_drawn(make_report, change):
    wild = ability("perplexity", "loss", 9.0, 9e9, Figure(value=change), unit="perplexity")
    assert "<svg" in render(make_report(abilities=[wild, *KICK[1:]]))
