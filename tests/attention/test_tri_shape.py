"""The choice of tri_shape, by loops."""

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import Flash, Prompt, SinkWindow, TriShape


@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (63, 63), (17, 130), (130, 130)])
@pytest.mark.parametrize(
    ("sinks", "size", "last", "dropped"), [(0, 1, 1, 0), (4, 8, 3, 0), (19, 30, 20, 0), (9, 4, 5, 6)]
)
def test_sinks_window_and_the_last_queries(tq, tk, sinks, size, last, dropped):
    def keeps(i, j):
        return j <= i and (j > i - size or j < sinks - dropped or i >= tk - last)

    policy = TriShape(num_sinks=sinks, window_size=size, num_last=last, q_block=16)
    mask = policy.select(torch.zeros(1, 2, tq, 4), torch.zeros(1, 1, tk, 4), Prompt(dropped=dropped))
    expected = torch.tensor([[keeps(i, j) for j in range(tk)] for i in range(tk - tq, tk)])
    assert torch.equal(mask.to_dense(causal=True)[0, 0, mask.q_len - tq :], expected)


def test_it_is_the_a_shape_with_a_dense_end():
    query, key, value, prompt = torch.randn(1, 4, 90, 8), *torch.randn(2, 1, 2, 100, 8), Prompt(scale=0.4)
    done = TriShape(num_sinks=5, window_size=13, num_last=7, q_block=16).attend(query, key, value, prompt)
    shape = SinkWindow(num_sinks=5, window_size=13, q_block=16).attend(query, key, value, prompt)
    exact = Flash().attend(query, key, value, prompt)
    torch.testing.assert_close(done.out[:, :, :-7], shape.out[:, :, :-7])
    torch.testing.assert_close(done.out[:, :, -7:], exact.out[:, :, -7:])
    assert done.kept.item() == sum(min(i, 18) for i in range(11, 94)) + sum(range(94, 101))


def test_memory_of_a_long_text_is_that_of_its_edges():
    text = torch.zeros(1, 1, 32768, 1)
    mask = TriShape().select(text, text, Prompt())
    assert mask.elements is not None
    assert len(mask.elements) < 4 * len(mask.blocks[0, 0])


@pytest.mark.parametrize(("tq", "tk", "dropped"), [(1, 1, 0), (40, 40, 0), (17, 40, 0), (17, 40, 6)])
def test_a_block_longer_than_the_text_is_the_text(tq, tk, dropped):
    inputs = torch.randn(1, 4, tq, 8), *torch.randn(2, 1, 2, tk, 8)
    found, wanted = (
        TriShape(num_sinks=9, window_size=7, num_last=5, q_block=size).attend(*inputs, Prompt(dropped=dropped))
        for size in (1 << 33, 64)
    )
    assert torch.equal(found.kept, wanted.kept)
    torch.testing.assert_close(found.out, wanted.out, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{"num_sinks": -1}, {"window_size": 0}, {"num_last": 0}, {"last": 3}])
def test_bad_options(options):
    with pytest.raises(ValidationError):
        TriShape(**options)
