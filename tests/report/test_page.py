import math
import re
from html.parser import HTMLParser

import pytest

from paucity.report import Measurement, Retrieval, StepRecord, render
from paucity.report.figures import pictures

FIGURES = ["quality", "lengths", "layers", "retrieval", "heads"]
VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = '\x00 漢 $\\frac{$ <script>alert("x")</script> & "><img src=x onerror=y>'


class Page(HTMLParser):
    """Tags, ids, references and text; fails on a tag that is not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.references, self.headings, self.open = [], [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += re.findall(r"#([\w.-]+)", attributes.get("href", "") + attributes.get("clip-path", ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="session")
def html(make_report):
    return render(make_report())


def test_every_section_and_figure_is_there(html):
    page = Page(html)
    assert page.headings == [
        "Dense against sparse",
        "Figures",
        "What the heads read",
        "What was done",
        "Every number",
        "Setting",
        "Recipe",
        "What the figures mean",
    ]
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert [attributes["class"] for attributes in drawn] == FIGURES
    assert all(attributes["role"] == "img" and len(attributes["aria-label"]) > 20 for attributes in drawn)


def test_figures_say_what_was_measured(make_report):
    found = {picture.name: picture for picture in pictures(make_report())}
    assert "dense 1.000 bits per byte at 1,000 ms; sparse 1.021 bits per byte at 700 ms" in found["quality"].svg
    assert "2 kinds of site in 3 layers: 50 % to 50 %" in found["layers"].svg
    assert "2 layers with 2 heads each: 10 % to 100 %" in found["heads"].svg
    assert all(f">{text}<" in found["heads"].svg for text in ("10", "50", "100"))
    assert "mlp.down_proj" in found["layers"].svg
    assert "98 → 98 %" in found["retrieval"].svg


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(html):
    page = Page(html)
    assert "http" not in html
    assert "@import" not in html
    assert re.findall(r"url\((?!#|data:image/png;base64,)", html) == []
    assert {"script", "link", "img", "iframe", "image", "object"}.isdisjoint(tag for tag, _ in page.tags)
    assert all(value.startswith("#") for _, a in page.tags for key, value in a.items() if key in ("href", "src"))


def test_ids_are_unique_and_references_resolve(html):
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    labelled = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert page.references
    assert {*page.references, *labelled} <= set(page.ids)


def test_figures_take_the_colours_of_the_page(html):
    drawn = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    colors = set(re.findall(r"var\(--(\w+)\)", "".join(drawn)))
    assert {"ink", "muted", "rule", "dense", "sparse", "heat"} <= colors
    assert re.findall(r"#0\d0\d0\d|font-family", "".join(drawn)) == []
    assert all(html.count(f"--{color}:") == 2 for color in colors), "each is defined for light and for dark"


def test_is_deterministic(make_report, html):
    created = make_report().created
    assert render(make_report(created=created)) == render(make_report(created=created))


def test_strings_are_escaped(make_report, make_measurement):
    part = Retrieval(task=EVIL, length=1024, accuracy=0.5, low=0.4, high=0.6, num_prompts=9)
    report = make_report(
        title=EVIL,
        recipe={EVIL: EVIL},
        verdict=[EVIL],
        sparse=make_measurement(retrieval=[part], density={f"model.layers.0.{EVIL}": 0.5}),
        steps=[StepRecord(method=EVIL, family=EVIL, options={EVIL: [EVIL], "a": EVIL}, notes=[EVIL])],
    )
    html = render(report)
    page = Page(html)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert html.count("&lt;script&gt;") > 8
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)


def test_sections_without_data_are_left_out(bare_report):
    html = render(bare_report)
    assert Page(html).headings == ["Setting", "What the figures mean"]
    assert '<ul class="verdict"' not in html
    assert "None" not in html


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_odd_figures_neither_break_nor_vanish(make_report, make_measurement, value):
    sparse = make_measurement(bits_per_byte=value, perplexity=value, flops=value, density={"a.0.w": value or 0.5})
    report = make_report(sparse=sparse, head_density=[[value]])
    assert [picture.name for picture in pictures(report) if picture.name in ("quality", "heads")] == []
    assert {math.inf: "∞", None: "–"}.get(value, "not a number") in render(report)


def test_layer_figure_keeps_different_stems_apart(make_report):
    density = {"encoder.0.fc.weight": 0.1, "decoder.0.fc.weight": 0.9, "decoder.1.fc.weight": 0.9, "head.weight": 0.3}
    report = make_report(sparse=Measurement(density=density))
    (picture,) = (picture for picture in pictures(report) if picture.name == "layers")
    assert "encoder.*.fc" in picture.svg
    assert "decoder.*.fc" in picture.svg
    assert "10 % to 90 %" in picture.caption
    assert "head.weight" in render(report)
