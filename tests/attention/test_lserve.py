"""LServe: page scores and their reuse against loops, heads that stream, and which of them do."""

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import LServe, PagedSelection, Prompt, StreamingHeads, apply, prefill_split, record
from paucity.attention.decode.streaming_heads import stream_pages
from paucity.attention.lserve import streaming_loss
from paucity.checks import InputError

from .cached import grow, listed, random_layer
from .test_apply import logits, model_of, tokens


def policy(**options):
    sizes = {"num_keys": 12, "page_size": 4, "num_chunks": 2, "reselect_every": 3, "num_sinks": 5, "window_size": 6}
    return PagedSelection(**sizes | {"min_length": 0} | options)


def naive_pages(query, keys, count, size=4, chunk=2):
    """The best pages before the last one, and that, for the queries ``[G, D]`` of one list of keys ``[T, D]``."""
    last, scores = (len(keys) - 1) // size, []
    for page in range(last):
        bounds = []
        for at in range(page * size, page * size + size, chunk):
            low, high = keys[at : at + chunk].min(0).values, keys[at : at + chunk].max(0).values
            for q in query:
                bounds.append(sum(max(float(q[d] * low[d]), float(q[d] * high[d])) for d in range(len(q))))
        scores.append(max(bounds))
    best = sorted(range(last), key=lambda page: -scores[page])[: count - 1]
    return {*best, last}


@pytest.mark.parametrize("lengths", [(29, 17), (32, 3), (1, 1)])
def test_select_matches_naive(lengths):
    layer, first = random_layer(lengths)
    query = torch.randn(2, 4, 1, 8)
    cached = layer.cached(first)
    pages = policy().select(query, cached, Prompt())
    assert pages.page_size == 4
    for b, length in enumerate(lengths):
        for h in range(2):
            wanted = naive_pages(query[b, 2 * h : 2 * h + 2, 0], cached.keys()[b, h, :length], 3)
            found = listed(pages.numbers[b, h])
            assert len(found) == len(set(found))
            assert set(found) == wanted


def test_a_choice_holds_for_some_tokens_and_new_pages_are_read():
    layer, first = random_layer([30])
    chosen = []
    for step in range(8):
        grow(layer, step)
        pages = policy().select(torch.randn(1, 4, 1, 8), layer.cached(first), Prompt())
        chosen.append([set(listed(row)) for row in pages.numbers[0]])
        assert all((30 + step) // 4 in row for row in chosen[-1])
    for step in range(8):
        begun = {(30 + since) // 4 for since in range(step // 3 * 3, step + 1)}
        for now, then in zip(chosen[step], chosen[step // 3 * 3], strict=True):
            assert now == then | begun
    assert chosen[0] != chosen[3]
    layer.crop(-1)
    grow(layer, 99)
    query = torch.randn(1, 4, 1, 8)
    anew = policy().select(query, layer.cached(first), Prompt()).numbers[0, 0]
    assert set(listed(anew)) == naive_pages(query[0, :2, 0], layer.cached(first).keys()[0, 0], 3)


def test_another_policy_chooses_for_itself():
    layer, first = random_layer([30])
    query = torch.randn(1, 4, 1, 8)
    policy(num_keys=28).select(query, layer.cached(first), Prompt())
    pages = policy().select(query, layer.cached(first), Prompt())
    assert set(listed(pages.numbers[0, 1])) == naive_pages(query[0, 2:, 0], layer.cached(first).keys()[0, 1], 3)


@pytest.mark.parametrize("sinks", [0, 1, 5, 8])
@pytest.mark.parametrize("window", [1, 4, 6, 100])
def test_streaming_pages_match_naive(sinks, window):
    for length in (1, 4, 7, 30, 33):
        keys = {*range(min(sinks, length)), *range(max(0, length - window), length)}
        found = listed(stream_pages(torch.tensor([[length]]), sinks, window, 4)[0, 0])
        assert sorted(found) == sorted({key // 4 for key in keys})


def test_heads_stream_in_both_policies():
    layer, first = random_layer([40, 21])
    query, near = torch.randn(2, 4, 1, 8), stream_pages(torch.tensor([40, 21]), 5, 6, 4)
    both = policy(streaming=[[1]]).select(query, layer.cached(first), Prompt()).numbers
    alone = StreamingHeads(streaming=[[1]], num_sinks=5, window_size=6, page_size=4, min_length=0)
    numbers = alone.select(query, layer.cached(first), Prompt()).numbers
    plain = policy().select(query, layer.cached(first), Prompt()).numbers
    for b, length in enumerate((40, 21)):
        assert listed(both[b, 1]) == listed(numbers[b, 1]) == listed(near[b])
        assert listed(numbers[b, 0]) == list(range(-(-length // 4)))
        assert listed(both[b, 0]) == listed(plain[b, 0])
    assert StreamingHeads(streaming=[[]]).select(query, layer.cached(first), Prompt()) is None


def test_heads_that_lose_least_stream():
    model, texts = model_of("llama"), [tokens(40), tokens(33, seed=1)]
    loss = streaming_loss(model, texts, num_sinks=2, window_size=5)
    wanted = torch.zeros(2, 2)
    for text in texts:
        for seen in record(model, text):
            for head in range(2):
                query, key, value = seen.query[:, 2 * head : 2 * head + 2], seen.key[:, head], seen.value[:, head]
                row, column = torch.arange(text.shape[1])[:, None], torch.arange(text.shape[1])
                kept = (column <= row) & ((column < 2) | (row - column < 5))
                weight = (query @ key.mT * seen.prompt.scale).masked_fill(~kept, -torch.inf).softmax(-1)
                whole = seen.done.out[:, 2 * head : 2 * head + 2]
                wanted[seen.prompt.layer, head] += (weight @ value - whole).norm() / whole.norm() / 2
    torch.testing.assert_close(torch.stack([loss[0], loss[1]]), wanted, atol=1e-4, rtol=1e-3)
    found = LServe(num_sinks=2, window_size=5, num_keys=64).fit(model, texts)
    assert found.num_keys == 64
    streaming = [(layer, head) for layer, row in enumerate(found.streaming) for head in row]
    ranked = sorted((float(wanted[layer, head]), (layer, head)) for layer in range(2) for head in range(2))
    assert sorted(streaming) == sorted(head for _, head in ranked[:2])


def test_the_same_split_for_prompts():
    model, ids = model_of("llama"), tokens(40)
    decode = policy(streaming=[[0], []])
    split = prefill_split(decode, 4, 2, window_size=7)
    assert split.assignment == [[1, 1, 0, 0], [0, 0, 0, 0]]
    prompts = apply(model, split)
    apply(model, decode)
    logits(model, ids)
    kept = sum(min(i + 1, 7) + min(max(0, i - 6), 5) for i in range(40)) / (40 * 41 / 2)
    torch.testing.assert_close(prompts.head_density(), torch.tensor([[kept, kept, 1, 1], [1, 1, 1, 1]]))


def test_bad_input():
    model = model_of("llama")
    with pytest.raises(ValidationError, match=r"num_chunks must divide page_size \(4\), got 3"):
        policy(num_chunks=3)
    with pytest.raises(ValidationError, match=r"num_keys must be at least page_size \(4\), got 3"):
        policy(num_keys=3)
    with pytest.raises(InputError, match="paged_selection: streaming must have 2 layers, got 1"):
        apply(model, policy(streaming=[[0]]))
    with pytest.raises(InputError, match="streaming_heads: streaming must name KV heads below 2, got 2"):
        apply(model, StreamingHeads(streaming=[[2], []]))
    with pytest.raises(InputError, match="policy must name streaming heads, got None"):
        prefill_split(policy(), 4, 2)
    with pytest.raises(InputError, match="calibration must hold at least one text, got none"):
        LServe().fit(model, [])
    with pytest.raises(InputError, match="calibration must have a row of at least 385 tokens"):
        LServe().fit(model, [tokens(40)])
