"""A loss in segments is the loss, with its gradients and less memory."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from paucity.checks import InputError
from paucity.measure.memory import peak_memory_mb
from paucity.ops.segment_loss import segment_loss


@pytest.mark.parametrize("segment", [1, 3, 7, 100])
@pytest.mark.parametrize(("of_rows", "of_weight"), [(True, True), (True, False), (False, True)])
def test_loss_and_gradients_are_those_of_all_rows(segment, of_rows, of_weight):
    rows, weight = torch.randn(7, 4, requires_grad=of_rows), torch.randn(5, 4, requires_grad=of_weight)
    labels = torch.tensor([0, 1, -100, 4, 2, 2, -100])

    def loss(part, wanted):
        return cross_entropy(part @ weight.T, wanted, reduction="sum")

    inputs = [x for x in (rows, weight) if x.requires_grad]
    wanted = loss(rows, labels)
    found = segment_loss(loss, rows, labels, segment=segment, parameters=[weight])
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(2 * found, inputs), torch.autograd.grad(2 * wanted, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(segment_loss(loss, rows, labels, segment=segment), wanted.detach())


def test_the_peak_is_that_of_a_segment():
    rows, weight = torch.randn(512, 8, requires_grad=True), torch.randn(2000, 8)
    labels = torch.zeros(512, dtype=torch.long)

    def step(segment):
        def loss(part, wanted):
            return cross_entropy(part @ weight.T, wanted, reduction="sum")

        segment_loss(loss, rows, labels, segment=segment).backward()

    assert peak_memory_mb(lambda: step(32)) < peak_memory_mb(lambda: step(512)) / 8


def test_bad_input():
    rows = torch.ones(3, 2)
    with pytest.raises(InputError, match="segment must be at least 1, got 0"):
        segment_loss(lambda x, y: x.sum(), rows, torch.ones(3), segment=0)
    with pytest.raises(InputError, match=r"labels must have shape \[3\], got \[2\]"):
        segment_loss(lambda x, y: x.sum(), rows, torch.ones(2), segment=1)
    with pytest.raises(InputError, match="rows must have 2 dimensions"):
        segment_loss(lambda x, y: x.sum(), torch.ones(3), torch.ones(3), segment=1)
