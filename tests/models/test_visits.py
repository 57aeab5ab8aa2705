"""Forwards that wait in front of each block."""

from contextlib import closing

import pytest
import torch
from torch import nn

from paucity.checks import InputError
from paucity.models.blocks import sites_by_block
from paucity.models.sites import find_sites
from paucity.models.visits import in_turn, visits


def walk(model, kind, batches, look=lambda path: None):
    """Paths in turn, with how many batches went through; ``look`` is called before they do."""
    found = []
    with closing(visits(model, dict(sites_by_block(find_sites(model, kind))), batches)) as visited:
        for path, run in visited:
            look(path)
            found.append((path, sum(1 for _ in run)))
    return found


@torch.no_grad()
def test_each_block_sees_what_the_dense_ones_before_it_give():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batches, seen = [torch.randn(5, 3), torch.randn(2, 3)], []
    wanted = [model[:2](batch) for batch in batches]
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    last = []
    for path, run in visits(model, dict(sites_by_block(find_sites(model, "linear"))), batches):
        for _ in run:
            assert path == "0" or len(last) == 1  # the block before was changed only when all had left it
        model.get_submodule(path).weight.zero_()
        last.append(path)
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))


class Routed(nn.Module):
    """Batches of even sum pass the first expert by."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.last = nn.Linear(2, 2)

    def forward(self, x):
        which = int(x.sum()) % 2
        return self.last(self.experts[1](self.experts[0](x) if which else x))


def test_batches_that_pass_a_block_by_wait_further_on():
    model, batches = Routed(), [torch.tensor([[float(n), 0.0]]) for n in range(4)]
    assert walk(model, "linear", batches) == [("experts.0", 2), ("experts.1", 4), ("last", 4)]
    with pytest.raises(InputError, match=r"got experts.0.weight, which are not"):
        walk(model, "linear", batches[::2])


def test_a_block_that_repeats_lets_a_batch_through_as_often_as_it_comes():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    runs, model = [], Shared()
    model.a.register_forward_hook(lambda *_: runs.append(1))
    assert walk(model, "linear", [torch.ones(1, 2)] * 3) == [("a", 3), ("b", 3)]
    assert len(runs) == 6


class Net(nn.Module):
    """Two layers registered in the other order, run as ``forward`` says."""

    def __init__(self, forward):
        super().__init__()
        self.second, self.first = nn.Linear(4, 4), nn.Linear(4, 4)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def under(context):
    def forward(net, x):
        with context():
            return net.second(net.first(x))

    return forward


def test_what_runs_in_another_order_than_it_is_registered():
    model = Net(lambda net, x: net.second(net.first(x)))
    assert in_turn(model, ["second", "first"], torch.ones(2, 4))
    assert walk(model, "linear", [torch.ones(1, 4)] * 2) == [("first", 2), ("second", 2)]


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.first(net.second(net.first(x))),  # comes back
        under(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        under(torch.inference_mode),
    ],
)
def test_what_cannot_be_halted_between_its_blocks(forward):
    assert not in_turn(Net(forward), ["second", "first"], torch.ones(2, 4))


def test_a_language_model_goes_block_by_block(tiny_model):
    model = tiny_model("llama")
    here, steps = [], []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: steps.append(number))
    batches = [torch.ones(1, 5).long()] * 3
    found = walk(model, "mlp", batches, lambda path: here.append(len(steps)))
    assert found == [("model.layers.0", 3), ("model.layers.1", 3)]
    assert here == [0, 3]
    assert steps == [0, 0, 0, 1, 1, 1]


def test_an_error_in_a_forward_is_the_callers_and_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="shapes"):
        walk(model, "linear", [torch.ones(2, 3), torch.ones(2, 4)])

    def stop(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(model, "linear", [torch.ones(2, 3)] * 2, stop)
    assert not any(module._forward_pre_hooks for module in model.modules())
