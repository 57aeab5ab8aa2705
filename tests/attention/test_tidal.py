"""TidalDecode against its algorithm by loops over layers, and what it does when a layer stands alone."""

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import Knorm, Prompt, Tidal

from .test_decode_properties import layer_of


def naive_choice(query, keys, scale, count):
    """Tokens of a KV head with the largest weights, averaged over its queries."""
    weights = torch.stack([(q @ keys.T * scale).softmax(-1) for q in query]).mean(0)
    return set(sorted(range(len(keys)), key=lambda i: -float(weights[i]))[:count])


def chosen_by_layer(policy, layers, query, steps=1):
    """What each layer reads: None or sets of entries by (row, head)."""
    shared, found = {}, []
    for number, layer in enumerate(layers):
        layer.shared = shared
        if number < policy.dense_layers:
            found.append(None)
            continue
        pages = policy.select(query, layer.cached(), Prompt(layer=number, scale=0.5, num_layers=len(layers)))
        if pages is None:
            found.append(None)
        else:
            rows = range(pages.numbers.shape[0])
            found.append({(b, h): {int(n) for n in pages.numbers[b, h] if n >= 0} for b in rows for h in range(2)})
    return found


def test_matches_naive():
    layers = [layer_of(40, seed=i)[0] for i in range(7)]
    query = layer_of(40)[1]
    found = chosen_by_layer(Tidal(num_keys=6, reselect_layers=[4]), layers, query)
    assert [reads is None for reads in found] == [True, True, True, False, True, False, False]
    for number, source in ((3, 2), (5, 4), (6, 4)):
        for (row, head), reads in found[number].items():
            keys = layers[source].cached().keys()[row, head]
            assert reads == naive_choice(query[row, 2 * head : 2 * head + 2, 0], keys, 0.5, 6)


def test_a_choice_holds_for_its_step_alone():
    policy, layers = Tidal(num_keys=6, dense_layers=0, reselect_layers=[]), [layer_of(40, seed=i)[0] for i in range(2)]
    query = layer_of(40)[1]
    assert chosen_by_layer(policy, layers, query)[1] is not None
    shared = layers[1].shared
    for layer in layers:
        layer.update(torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8))
    assert (
        policy.select(query, layers[1].cached(), Prompt(layer=1, scale=0.5)) is None
    )  # it finds no choice, and chooses
    assert shared["tidal"][0] == 41


def test_tokens_are_found_where_lists_differ():
    policy, query = Tidal(num_keys=8, dense_layers=0, reselect_layers=[]), layer_of(40)[1]
    layers = [layer_of(40, seed=i)[0] for i in range(2)]
    for seed, layer in enumerate(layers):
        keep = torch.rand(2, 2, 40, generator=torch.Generator().manual_seed(seed)) < 0.7
        layer.evict(keep, layer.store.starts, Knorm())
    reads = chosen_by_layer(policy, layers, query)[1]
    for (row, head), found in reads.items():
        first, second = (layer.cached() for layer in layers)
        keys = first.keys()[row, head, : int(first.lengths[row, head])]
        best = naive_choice(query[row, 2 * head : 2 * head + 2, 0], keys, 0.5, 8)
        wanted = {int(first.positions()[row, head, i]) for i in best}
        there = second.positions()[row, head, : int(second.lengths[row, head])].tolist()
        assert {there[i] for i in found} == wanted & set(there)
        assert found


def test_bad_options():
    for wrong in ({"num_keys": 0}, {"reselect_layers": 3}, {"reselect_layers": ["3"]}):
        with pytest.raises(ValidationError):
            Tidal(**wrong)
