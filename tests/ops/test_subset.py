"""Tokens taken out and put back, against loops."""

import pytest
import torch

from paucity.checks import InputError
from paucity.ops.subset import subset

KEPT = torch.tensor([[True, False, True, True, False], [False, True, False, False, False], [False] * 5])


@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
def test_what_is_taken_is_put_back_in_its_place(rows):
    kept = KEPT[rows]
    chosen = subset(kept)
    assert chosen.index.shape == (len(rows), 3)
    assert not chosen.is_all
    x = torch.randn(len(rows), 5, 2, requires_grad=True)
    taken = chosen.take(x)
    for b in range(len(rows)):
        torch.testing.assert_close(taken[b, : int(kept[b].sum())], x[b, kept[b]])
    torch.testing.assert_close(chosen.put(taken), x * kept[..., None])
    other = torch.randn(len(rows), 5, 2)
    torch.testing.assert_close(chosen.put(taken, other), torch.where(kept[..., None], x, other))
    chosen.put(3 * taken, other).sum().backward()
    torch.testing.assert_close(x.grad, 3.0 * kept[..., None].expand_as(x))
    one = torch.randn(1, 5)
    torch.testing.assert_close(chosen.take(one)[0], one[0, [0, 2, 3]])


def test_masks_keep_filling_apart():
    chosen = subset(KEPT)
    causal = torch.ones(5, 5).tril().bool()[None, None]
    taken = chosen.take_mask(causal)
    assert taken[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert taken[1, 0].tolist() == [[True, False, False], [False, True, False], [False, False, True]]
    added = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    assert torch.equal(chosen.take_mask(added) == 0, taken)
    whole = subset(torch.ones(2, 5, dtype=torch.bool))
    assert whole.is_all
    assert torch.equal(whole.take_mask(causal), causal.expand(2, 1, 5, 5))


def test_bad_input():
    with pytest.raises(InputError, match="kept must be bool"):
        subset(torch.ones(1, 3))
    with pytest.raises(InputError, match=r"x must have shape \[3 or 1, 5, ...\], got \[3, 4\]"):
        subset(KEPT).take(torch.ones(3, 4))
    with pytest.raises(InputError, match="mask must have shape"):
        subset(KEPT).take_mask(torch.ones(1, 1, 5, 4))
