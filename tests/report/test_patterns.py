"""Pictures of heads: what a pixel says, and which are shown."""

import base64
import io

import numpy as np
import pytest
from matplotlib.image import imread

from paucity.report import picture_png, render
from paucity.report.compare import rows
from paucity.report.patterns import head_pictures, spread


def test_a_pixel_is_darker_where_more_is_computed_and_clear_where_nothing_is():
    image = imread(io.BytesIO(base64.b64decode(picture_png([[1.0, float("nan")], [0.01, 0.0]]))))
    assert image.shape == (2, 2, 4)
    opacity = image[..., 3]
    assert opacity[0, 0] == 1
    assert opacity[0, 1] == opacity[1, 1] == 0
    assert 0.15 < opacity[1, 0] < 0.3
    assert picture_png(np.eye(3).tolist()) == picture_png(np.eye(3).tolist())


@pytest.mark.parametrize(
    ("length", "most", "wanted"), [(3, 8, [0, 1, 2]), (9, 3, [0, 4, 8]), (32, 8, [0, 4, 9, 13, 18, 22, 27, 31])]
)
def test_of_many_some_at_even_distances_are_shown(length, most, wanted):
    assert list(spread(range(length), most)) == wanted


def test_heads_say_their_figures_and_layers_without_pictures_are_left_out(make_report):
    shown = head_pictures(make_report())
    assert [layer for layer, _ in shown] == [1]
    assert [head.alt for head in shown[0][1]] == [
        "Layer 1, head 0: density 10 %, recall 90 %, error 5 %",
        "Layer 1, head 1: density 50 %, recall 95 %, error 2 %",
    ]
    html = render(make_report())
    assert html.count("data:image/png;base64,") == 2
    assert "1 of 2 layers are shown" in html


def test_the_attention_part_stands_with_its_share(make_report, make_measurement):
    found = {row.label: row for row in rows(make_report())}
    part = found["Attention, 4,096 tokens"]
    assert (part.dense, part.sparse, part.judgement) == ("500 ms (50 %)", "100 ms (14 %)", "better")
    assert found["of that, choosing"].sparse == "4.00 ms"
    other = make_report(sparse=make_measurement(prefill_tokens=512), dense=make_measurement(prefill_tokens=512))
    assert {row.label: row for row in rows(other)}["Attention, 4,096 tokens"].dense == "500 ms"
