"""Oracles, block top-k and streaming decode against their definitions by loops."""

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import BlockTopKDecode, OracleTopK, Prompt, StreamingDecode, TopP

from .test_decode_properties import layer_of

FIRST = torch.tensor([0, 9])


def reads(policy, length=40):
    """What a policy lists for each list of a batch with padding: (keys, queries, numbers)."""
    layer, query = layer_of(length)
    cached = layer.cached(FIRST)
    numbers = policy.select(query, cached, Prompt(scale=0.5, layer=1)).numbers
    keys = cached.keys()
    for row in range(2):
        for head in range(2):
            mine = keys[row, head, : int(cached.lengths[row, head])]
            yield mine, query[row, 2 * head : 2 * head + 2, 0], {int(n) for n in numbers[row, head] if n >= 0}


def mean_weights(query, keys):
    return torch.stack([(q @ keys.T * 0.5).softmax(-1) for q in query]).mean(0).tolist()


def test_oracle_topk():
    for keys, query, found in reads(OracleTopK(num_keys=5)):
        weights = mean_weights(query, keys)
        assert found == set(sorted(range(len(keys)), key=lambda i: -weights[i])[:5])


@pytest.mark.parametrize("p", [0.01, 0.5, 0.95])
def test_top_p_is_the_smallest_set(p):
    sizes = set()
    for keys, query, found in reads(TopP(p=p)):
        weights, wanted, mass = mean_weights(query, keys), set(), 0.0
        for i in sorted(range(len(keys)), key=lambda i: -weights[i]):
            if mass >= p:
                break
            wanted.add(i)
            mass += weights[i]
        assert found == wanted
        sizes.add(len(found))
    assert p < 0.1 or len(sizes) > 1


def test_block_topk():
    policy = BlockTopKDecode(num_keys=20, page_size=4, num_sinks=3, window_size=6)
    for keys, query, found in reads(policy):
        pages = [keys[i : i + 4] for i in range(0, len(keys), 4)]
        last = len(pages) - 1
        always = {0, last, last - 1, last - 2}
        assert {(len(keys) - 1 - i) // 4 for i in range(6)} <= always
        score = [float(sum(q @ page.mean(0) for q in query)) for page in pages]
        rest = sorted(set(range(len(pages))) - always, key=lambda page: -score[page])
        assert found == always | set(rest[: 5 - len(always)])


@pytest.mark.parametrize("window", [1, 7, 35, 100])
def test_streaming_decode(window):
    for keys, _, found in reads(StreamingDecode(num_sinks=3, window_size=window)):
        assert found == {i for i in range(len(keys)) if i < 3 or i >= len(keys) - window}


def test_bad_options():
    for method, wrong in (
        (TopP, {"p": 0.0}),
        (TopP, {"p": 1.5}),
        (StreamingDecode, {"window_size": 0}),
        (BlockTopKDecode, {"window_size": 0}),
        (BlockTopKDecode, {"page_size": 0}),
        (OracleTopK, {"num_keys": 0}),
    ):
        with pytest.raises(ValidationError):
            method(**wrong)
