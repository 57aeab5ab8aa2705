"""Which layers longgen keeps full, and what rules the others."""

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import LongGen, Sharded, SinkWindow, apply
from paucity.attention.longgen import full_layers
from paucity.checks import InputError


def test_the_middle_third_by_count():
    assert [full_layers(n) for n in (1, 2, 3, 5, 6)] == [[0], [0], [1], [1, 2], [2, 3]]
    assert full_layers(32) == list(range(10, 21))
    for layers in range(1, 60):
        full = full_layers(layers)
        before, after = full[0], layers - 1 - full[-1]
        assert len(full) == max(1, round(layers / 3))
        assert after - before in (0, 1)


@pytest.mark.parametrize(
    ("placement", "wanted"), [("first", [0, 1, 2]), ("last", [6, 7, 8]), ("spread", [1, 4, 7]), ("middle", [3, 4, 5])]
)
def test_placements(placement, wanted):
    assert full_layers(9, placement=placement) == wanted


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_spread_layers_are_distinct(count):
    assert len(set(full_layers(9, share=count / 9, placement="spread"))) == count


@pytest.mark.parametrize(
    ("options", "sparse"),
    [({}, [1]), ({"placement": "last"}, [0]), ({"full_layers": [1]}, [0]), ({"full_layers": []}, [0, 1])],
)
def test_full_layers_are_the_models_own_and_the_others_are_the_patterns(tiny_model, options, sparse):
    model, ids = tiny_model("llama"), torch.arange(1, 41)[None] % 64
    pattern = {"method": "sink_window", "num_sinks": 1, "window_size": 3, "min_length": 0}
    policy = LongGen.model_validate({"pattern": pattern, **options}).fit(model, [])
    assert policy == SinkWindow(num_sinks=1, window_size=3, min_length=0, layers=sparse)
    applied = apply(model, policy)
    model(input_ids=ids)
    density = applied.density()
    kept = sum(min(i, 4) for i in range(1, 41)) / (40 * 41 / 2)
    assert density == {f"layers.{i}.attention": pytest.approx(kept if i in sparse else 1.0) for i in (0, 1)}


def test_any_pattern_and_json():
    search = LongGen(pattern=Sharded(vert_stride=2), placement="spread")
    data = search.model_dump(mode="json")
    assert data["pattern"] == {"method": "sharded", "vert_stride": 2}
    assert LongGen.model_validate(data) == search


def test_bad_options(tiny_model):
    for options in (
        {"full_share": 0.0},
        {"full_share": 1.0},
        {"placement": "top"},
        {"pattern": SinkWindow(layers=[0])},
    ):
        with pytest.raises(ValidationError):
            LongGen(**options)
    with pytest.raises(InputError, match=r"full_layers must be in \[0, 1\], got 2"):
        LongGen(full_layers=[2]).fit(tiny_model("llama"), [])
