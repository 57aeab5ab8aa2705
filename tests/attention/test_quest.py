"""Quest against its definition by loops, and that its score is a bound."""

import math

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import Prompt, Quest
from paucity.attention.decode.quest import bound_scores, extremes

from .test_decode_properties import layer_of


def naive(query, keys, page_size, join, budget):
    """Pages of one list by loops: the newest, and those with the highest bounds."""
    score = []
    for first in range(0, len(keys), page_size):
        page = keys[first : first + page_size]
        each = []
        for q in query:
            terms = [max(q[d] * page[:, d].min(), q[d] * page[:, d].max()) for d in range(len(q))]
            each.append(float(sum(terms)))
        score.append(max(each) if join == "max" else sum(each) / len(each))
    newest = len(score) - 1
    best = sorted(range(newest), key=lambda page: -score[page])[: max(1, budget // page_size) - 1]
    return {newest, *best}


@pytest.mark.parametrize("join", ["max", "mean"])
@pytest.mark.parametrize(
    ("length", "page_size", "budget"), [(40, 4, 16), (37, 4, 12), (33, 8, 8), (29, 16, 3), (1, 4, 4)]
)
def test_matches_naive(length, page_size, budget, join):
    layer, query = layer_of(length)
    cached = layer.cached()
    found = Quest(num_keys=budget, page_size=page_size, join=join).select(query, cached, Prompt(layer=2))
    assert found.page_size == page_size
    for row in range(2):
        for head in range(2):
            mine = query[row, 2 * head : 2 * head + 2, 0]
            wanted = naive(mine, cached.keys()[row, head], page_size, join, budget)
            assert {int(p) for p in found.numbers[row, head] if p >= 0} == wanted


def test_no_logit_is_above_the_bound():
    layer, query = layer_of(48)
    keys = layer.cached().keys()
    (bounds,) = extremes(keys.view(2, 2, 8, 6, 8), torch.ones(2, 2, 8, 6, dtype=torch.bool))
    logits = (query.view(2, 2, 2, 8) @ keys.mT).amax(2).view(2, 2, 8, 6).amax(-1)
    assert (bound_scores(query, bounds, "max") >= logits - 1e-5).all()


def test_first_layers_are_dense_and_bad_options_are_refused():
    layer, query = layer_of(48)
    chosen = Quest(num_keys=16, page_size=4, min_length=0)
    kept = [int(chosen.attend(query, layer.cached(), Prompt(layer=i)).kept[0, 0]) for i in range(4)]
    assert kept == [48, 48, 16, 16]
    for wrong in ({"page_size": 0}, {"num_keys": 0}, {"join": "sum"}, {"dense_layers": -1}):
        with pytest.raises(ValidationError):
            Quest(**wrong)
    assert math.isfinite(float(chosen.attend(query, layer.cached(), Prompt(layer=2)).out.sum()))
