"""Verdicts, figures and the page, of an invented result."""

import math
import re

import pytest

from paucity.report import Environment, ModelFacts
from paucity.study import CostRow, Result, Row
from paucity.study.figures import frontier
from paucity.study.page import render
from paucity.study.results import ALL_TASKS
from paucity.study.verdict import leaders, tolerated, verdict, wins

ENVIRONMENT = Environment(paucity="0.1.0", python="3.11", torch="2.13", transformers="5.0", cpu="an x86", threads=2)


def row(method, task, budget, value, *, phase="prefill", density=None, dense=1.0, **fields):
    accuracy = task != "perplexity"
    return Row(
        **{
            "phase": phase,
            "method": method,
            "task": task,
            "length": 2048,
            "budget": budget,
            "density": budget if density is None else density,
            "value": value,
            "low": max(0.0, value - 0.1),
            "high": min(1.0, value + 0.1) if accuracy else value + 0.1,
            "change": value - dense,
            "change_low": value - dense - 0.1,
            "change_high": value - dense + 0.1,
            "num_prompts": 20,
        }
        | fields
    )


@pytest.fixture
def result():
    rows = []
    for phase, first, second in (("prefill", "sharp", "wide"), ("decode", "quick", "wide evict")):
        for task in ("passkey", "needles", ALL_TASKS):
            rows.append(row("dense", task, 1.0, 1.0, phase=phase))
            for budget in (0.1, 0.2):
                good = 0.97 if phase == "decode" or budget == 0.2 else 0.5
                rows.append(row(first, task, budget, good if task == "passkey" else good - 0.01, phase=phase))
                rows.append(row(second, task, budget, good - 0.3 if task == "passkey" else good, phase=phase))
        rows.append(row("dense", "threads <3>", 1.0, 0.05, phase=phase))
        rows.append(row(first, "threads <3>", 0.1, 0.05, phase=phase))
        rows.append(row("dense", "perplexity", 1.0, 1.5, phase=phase))
        rows.append(row(first, "perplexity", 0.1, 1.6, phase=phase, dense=1.5, dense_texts={"short": 3}))
        rows.append(row(first, "perplexity", 0.2, 1.51, phase=phase, dense=1.5))
    costs = [
        CostRow(
            phase="prefill",
            method="sharp",
            length=2048,
            budget=budget,
            density=budget,
            flops=5e9 + budget * 1e9,
            dense_flops=1e10,
            seconds=0.1 + budget,
            dense_seconds=0.4,
            select_seconds=0.01,
        )
        for budget in (0.1, 0.2)
    ]
    facts = ModelFacts(source="tiny", architecture="Llama", num_parameters=4_500_000, dtype="bfloat16")
    return Result(
        title="<b>Frontiers</b>",
        seconds=12.0,
        plan={"budgets": [0.1, 0.2]},
        environment=ENVIRONMENT,
        model=facts,
        rows=rows,
        costs=costs,
    )


def test_leaders_read_no_more_than_the_bound_and_share_ties(result):
    assert [r.method for r in leaders(result, "prefill", "passkey", 2048, 0.1)] == ["sharp"]
    assert [r.method for r in leaders(result, "prefill", "needles", 2048, 0.2)] == ["wide"]
    assert leaders(result, "prefill", "passkey", 2048, 0.05) == []
    assert [r.method for r in leaders(result, "prefill", "threads <3>", 2048, 0.5)] == ["sharp"]
    (lead,) = leaders(result, "prefill", "perplexity", 2048, 0.2)
    assert lead.value == 1.51  # fewer bits are better


def test_the_sparsest_setting_must_keep_every_task(result):
    tasks = ["passkey", "needles", "perplexity"]
    assert [(f.method, f.density) for f in tolerated(result, "prefill", 2048, tasks)] == [("sharp", 0.2)]
    assert [(f.method, f.density) for f in tolerated(result, "decode", 2048, tasks[:2])] == [("quick", 0.1)]


def test_the_verdict_follows_from_the_rows(result):
    text = " ".join(verdict(result))
    assert "Prefill: sharp keeps 95 % of the dense quality on every task while it reads 20 %" in text
    assert "No method is best everywhere" in text
    assert "cannot do threads <3> (5 %)" in text
    won, total = wins(result)
    assert total == 12  # two phases, three tasks that tell something, two bounds
    assert won["sharp"] == 2 + 2
    assert won["quick"] == 4


def test_one_method_that_always_leads_is_said_to(result):
    only = [r for r in result.rows if r.method in ("dense", "sharp") and r.phase == "prefill"]
    worse = [r.model_copy(update={"method": "poor", "value": r.value / 2}) for r in only if r.method == "sharp"]
    worse = [r for r in worse if r.task != "perplexity"]
    text = " ".join(verdict(result.model_copy(update={"rows": only + worse})))
    assert "sharp leads everywhere" in text


def test_the_page_holds_a_figure_for_each_task_and_escapes_text(result):
    page = render(result.model_copy(update={"verdict": verdict(result)}))
    assert "<b>Frontiers" not in page
    assert "&lt;b&gt;Frontiers&lt;/b&gt;" in page
    assert "threads <3>" not in page
    figures = re.findall(r'<figure id="([^"]+)"', page)
    assert len(figures) == len(set(figures)) == 2 * 5 + 2  # tasks and their mean in both phases; work and time of one
    assert page.count("<svg viewBox") == len(figures) + 2 * (2 + 1)  # and the legends
    assert "<script" not in page
    assert 'src="' not in page
    assert "the dense model cannot do it" in page
    assert "3 left dense" in page
    assert "3.3\N{NO-BREAK SPACE}%" in page  # of the time is the choice, at the larger budget


def test_a_page_without_costs_leaves_their_sections_out(result):
    page = render(result.model_copy(update={"costs": []}))
    assert "what it cost" not in page
    assert "within so many" not in page


def test_rows_without_a_density_are_left_out_of_the_figures(result):
    rows = [row("dense", "qa", 1.0, 0.9), row("sharp", "qa", 0.1, 0.8, density=math.nan)]
    some = [*rows, row("wide", "qa", 0.2, 0.7)]
    for found, best in ((rows, "dense"), (some, "wide")):
        picture = frontier(result.model_copy(update={"rows": found}), "prefill", "qa", 2048)
        assert f"the best {best}" in picture.svg
