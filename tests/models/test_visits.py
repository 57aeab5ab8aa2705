"""Forwards that wait in front of each site."""

import pytest
import torch
from torch import nn

from paucity.checks import InputError
from paucity.models.sites import find_sites
from paucity.models.visits import Door, visits
from paucity.weights.layerwise import empty_statistics
from paucity.weights.statistics import InputNorm


def go(model, sites, batches, **options):
    return visits(model, sites, batches, lambda site, size: empty_statistics(model, InputNorm, site, size), **options)


@torch.no_grad()
def test_what_is_written_at_a_site_is_what_runs():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [torch.randn(5, 3), torch.randn(2, 3)]
    seen = {}
    for site, (inputs,) in go(model, find_sites(model, "linear"), batches):
        seen[site.name] = inputs.norm
        model.get_parameter(site.name).mul_(2)
    hidden = torch.cat(batches) @ model[0].weight.T + model[0].bias  # twice the weight of before
    torch.testing.assert_close(seen["0.weight"], torch.cat(batches).norm(dim=0))
    torch.testing.assert_close(seen["2.weight"], hidden.relu().norm(dim=0))
    assert not model[0]._forward_pre_hooks


def test_sites_of_one_tensor_share_and_a_changed_tensor_does_not(tiny_model):
    model = tiny_model("llama")
    found = {site.name: inputs for site, inputs in go(model, find_sites(model, "attention"), [torch.ones(1, 9).long()])}
    first = [found[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkvo"]
    assert first[0] is first[1] is first[2]
    assert first[3] is not first[0]

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            y = x.clone()
            out = self.a(y)
            y.mul_(3)  # in place: the same address, other numbers
            return out + self.b(y)

    twice, x = Twice(), torch.randn(4, 2)
    norms = [inputs.norm.clone() for _, (inputs,) in go(twice, find_sites(twice, "linear"), [x])]
    torch.testing.assert_close(norms[1], 3 * norms[0])


class Routed(nn.Module):
    """Batches of even sum pass the first expert by."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.last = nn.Linear(2, 2)

    def forward(self, x):
        which = int(x.sum()) % 2
        return self.last(self.experts[1](self.experts[0](x) if which else x))


def test_batches_that_pass_a_site_by_wait_further_on():
    model, batches = Routed(), [torch.tensor([[float(n), 0.0]]) for n in range(4)]
    counts = {site.name: inputs.num_tokens for site, (inputs,) in go(model, find_sites(model, "linear"), batches)}
    assert counts == {"experts.0.weight": 2, "experts.1.weight": 4, "last.weight": 4}
    with pytest.raises(InputError, match=r"got experts.0.weight, which are not"):
        list(go(model, find_sites(model, "linear"), batches[::2]))


def test_doors_open_when_all_are_through(tiny_model):
    model = tiny_model("llama")
    paths = ["model.layers.0", "model.layers.1"]
    places = [place for place, _ in go(model, find_sites(model, "mlp"), [torch.ones(1, 5).long()] * 3, doors=paths)]
    names = [f"{place.path} {place.entrance}" if isinstance(place, Door) else place.kind for place in places]
    inside = ["gate", "up", "down"]
    assert names == [step for path in paths for step in (f"{path} True", *inside, f"{path} False")]


def test_an_error_in_a_forward_is_the_callers_and_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="size"):
        list(go(model, find_sites(model, "linear"), [torch.ones(2, 3), torch.ones(2, 4)]))
    started = go(model, find_sites(model, "linear"), [torch.ones(2, 3)] * 2)
    next(started)
    started.close()
    assert not any(module._forward_pre_hooks for module in model.modules())
