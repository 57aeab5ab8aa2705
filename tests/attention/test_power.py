"""The choice of power, by loops, and how far it reaches."""

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import Power, Prompt

POWERS = {2**k for k in range(20)}


def elements(policy, tq, tk, dropped=0):
    mask = policy.select(torch.zeros(1, 2, tq, 4), torch.zeros(1, 1, tk, 4), Prompt(dropped=dropped))
    return mask.to_dense(causal=True)[0, 0, mask.q_len - tq :]


@pytest.mark.parametrize(("tq", "tk", "dropped"), [(1, 1, 0), (63, 63, 0), (17, 130, 0), (90, 97, 22)])
@pytest.mark.parametrize(("block", "window", "sinks"), [(4, 3, 1), (1, 1, 0), (5, 2, 2)])
def test_near_blocks_powers_of_two_and_sinks(tq, tk, dropped, block, window, sinks):
    def keeps(i, j):
        distance = i // block - j // block
        return j <= i and (distance < window or distance in POWERS or j // block < sinks)

    end = tk + dropped
    expected = [[keeps(i, j) for j in range(dropped, end)] for i in range(end - tq, end)]
    policy = Power(q_block=block, window_blocks=window, sink_blocks=sinks)
    assert torch.equal(elements(policy, tq, tk, dropped), torch.tensor(expected))


def test_defaults_see_ten_blocks_of_a_hundred_and_twenty_eight():
    mask = Power().select(torch.zeros(1, 1, 32768, 1), torch.zeros(1, 1, 32768, 1), Prompt())
    last = mask.blocks[0, 0, -1].nonzero().flatten()
    assert (127 - last).tolist() == [127, 64, 32, 16, 8, 4, 3, 2, 1, 0]


def test_everything_is_reached_after_as_many_layers_as_a_distance_has_ones():
    see = Power(q_block=1, window_blocks=1, sink_blocks=0)
    one = elements(see, 64, 64)
    reached = torch.eye(64, dtype=torch.bool)
    for layer in range(1, 7):
        reached = (reached.float() @ one.float()) > 0
        assert reached[63].tolist() == [(63 - j).bit_count() <= layer for j in range(64)]


@pytest.mark.parametrize("options", [{"window_blocks": 0}, {"sink_blocks": -1}, {"q_block": 0}, {"window": 2}])
def test_bad_options(options):
    with pytest.raises(ValidationError):
        Power(**options)
