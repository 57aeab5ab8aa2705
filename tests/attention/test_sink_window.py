"""The choice of sink_window, by loops."""

import pytest
import torch
from pydantic import ValidationError

from paucity.attention.prompt import Prompt
from paucity.attention.sink_window import SinkWindow


@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (63, 63), (17, 130)])
@pytest.mark.parametrize(("sinks", "size"), [(0, 1), (4, 8), (128, 3968)])
def test_every_query_sees_the_first_and_the_latest(tq, tk, sinks, size):
    policy = SinkWindow(num_sinks=sinks, window_size=size, q_block=16)
    pattern = policy.select(torch.zeros(1, 2, tq, 4), torch.zeros(1, 1, tk, 4), Prompt(0, 1.0))
    expected = [[j <= i and (j > i - size or j < sinks) for j in range(tk)] for i in range(tk - tq, tk)]
    assert torch.equal(pattern.visible(tq, tk)[0, 0], torch.tensor(expected))
    kept = [sum(row) for row in expected]
    assert pattern.kept_keys(tq, tk)[0].tolist() == kept
    assert max(kept) <= sinks + size


def test_sizes_as_shares_of_the_length():
    policy = SinkWindow(sink_share=0.1, window_share=0.25)
    assert policy.sizes(1000) == (100, 250)
    assert policy.sizes(1) == (0, 1)
    pattern = policy.select(torch.zeros(1, 2, 7, 4), torch.zeros(1, 1, 70, 4), Prompt(0, 1.0, dropped=30))
    assert (pattern.num_sinks, pattern.window_size) == (0, 25)
    assert (policy.lookahead(40), SinkWindow().lookahead(40)) == (40, 1)


@pytest.mark.parametrize(
    "options",
    [{"num_sinks": -1}, {"window_share": 0.0}, {"sink_share": 1.5}, {"window_size": 0}, {"window": 4}, {"q_block": 0}],
)
def test_bad_options(options):
    with pytest.raises(ValidationError):
        SinkWindow(**options)
