"""Dependency groups: what hangs together, zeros against removal for every kind of graph, what is locked and why."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paucity.checks import InputError
from paucity.models.resize import fit_to
from paucity.models.vision import ConvNet, ViT
from paucity.weights.structured.channels_groups import channel_groups
from paucity.weights.structured.channels_shrink import channel_masks, shrink_channels

from . import channel_nets as nets

SIZES = {
    "plain": {"one.0": 8, "two.0": 12},
    "residual": {"stem.0": 8, "a.0": 10, "short": 12, "c.0": 6},
    "padded_shortcut": {"stem.0": 8, "a.0": 10},
    "dense_blocks": {"one.0": 6, "two.0": 4, "three.0": 8},
    "depthwise": {"stem.0": 8, "point": 12, "two.0": 6},
    "grouped": {"stem.0": 6, "wide.0": 4},
    "flattened": {"one.0": 6, "hidden": 7},
    "group_norm": {"one": 4, "two.0": 6},
    "instance_norm": {"one": 8},
    "squeeze_excite": {"one.0": 8, "down": 4, "two.0": 6},
    "upsampled": {"one.0": 6, "two.0": 8, "turn": 4},
    "reused": {"stem.0": 8},
    "scaled": {"one.0": 4, "two.0": 6, "three.0": 6},
    "looped": {"stem.0": 8},
}


def build(way):
    torch.manual_seed(0)
    model = way().eval()
    for module in model.modules():  # norms with something to forget
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    return model, torch.randn(2, 3, 8, 8)


def some_kept(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = {group.name: torch.rand(group.size, generator=generator) < 0.6 for group in groups if not group.locked}
    return {name: mask | (torch.arange(len(mask)) == 0) for name, mask in kept.items()}


@pytest.mark.parametrize("way", nets.NETS, ids=lambda way: way.__name__)
def test_every_graph_has_its_groups_and_removal_equals_zeros(way):
    model, images = build(way)
    before = copy.deepcopy(model.state_dict())
    groups = channel_groups(model, images)
    assert {group.name: group.size for group in groups if not group.locked} == SIZES[way.__name__]
    for seed in range(3):
        kept = some_kept(groups, seed)
        smaller = shrink_channels(model, groups, kept)
        masked = copy.deepcopy(model)
        channel_masks(model, groups, kept).apply_(masked)
        assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(smaller(images), masked(images), rtol=1e-4, atol=1e-5)
        again = way().eval()
        fit_to(again, smaller.state_dict())
        torch.testing.assert_close(again(images), smaller(images), rtol=0, atol=0)
        assert [repr(module) for module in again.modules()] == [repr(module) for module in smaller.modules()]
        smaller.train()(images).sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in smaller.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training


def test_attributes_are_those_of_the_smaller_layers():
    model, images = build(nets.depthwise)
    groups = channel_groups(model, images)
    kept = {"stem.0": torch.arange(8) < 5, "point": torch.arange(12) % 2 == 0}
    smaller = shrink_channels(model, groups, kept)
    deep, wide = smaller.deep[0], smaller.deep2[0]
    assert (deep.in_channels, deep.out_channels, deep.groups) == (5, 5, 5)
    assert (wide.in_channels, wide.out_channels, wide.groups) == (6, 12, 6)
    assert (smaller.deep[1].num_features, smaller.point.in_channels, smaller.point.out_channels) == (5, 5, 6)
    model, images = build(nets.group_norm)
    smaller = shrink_channels(model, channel_groups(model, images), {"one": torch.tensor([True, False, True, True])})
    assert (smaller.norm.num_groups, smaller.norm.num_channels, smaller.one.out_channels) == (3, 9, 9)


def test_a_tied_group_holds_every_layer_that_must_lose_the_channel():
    """Naive reference: a chain of residual blocks, by hand."""
    model, images = build(nets.residual)
    stem = next(group for group in channel_groups(model, images) if group.name == "stem.0")
    norms = [f"{layer}.1.{what}" for layer in ("stem", "b") for what in ("weight", "bias")]
    norms += [f"{layer}.1.running_{what}" for layer in ("stem", "b") for what in ("mean", "var")]
    expected = {("stem.0.weight", 0), ("b.0.weight", 0), ("a.0.weight", 1), ("short.weight", 1), ("c.0.weight", 1)}
    assert {(member.name, member.dim) for member in stem.members} == expected | {(name, 0) for name in norms}
    assert all(torch.equal(member.units, torch.arange(8)) for member in stem.members)


def one_layer(way, **layers):
    return nets.Net(way, one=nets.conv(3, 8), two=nets.conv(8, 8), head=nn.Linear(8, 5), **layers)


LOCKED = {
    "slice": (lambda m, x: m.head(nets.pooled(F.pad(m.two(m.one(x))[:, 2:], (0, 0, 0, 0, 1, 1)))), "two.0", "fixed"),
    "mean": (lambda m, x: m.head(nets.pooled(m.two(m.one(x)) * m.one(x).mean(1, keepdim=True))), "one.0", "mean mixes"),
    "softmax": (lambda m, x: m.head(nets.pooled(m.two(m.one(x).softmax(1)))), "one.0", "softmax mixes them"),
    "norm": (lambda m, x: m.head(F.layer_norm(nets.pooled(m.two(m.one(x))), (8,))), "two.0", "a layer norm mixes them"),
    "product": (lambda m, x: m.head(nets.pooled(m.two(m.one(x))) @ torch.eye(8)), "two.0", "mm mixes them"),
    "input": (lambda m, x: m.head(nets.pooled(m.two(m.one(x) + x.repeat(1, 3, 1, 1)[:, :8]))), "one.0", "the input"),
    "literal": (lambda m, x: m.head(m.two(m.one(x)).reshape(2, 8, 64).mean(2)), "two.0", "size fixed"),
    "read": (lambda m, x: m.head(nets.pooled(m.two(m.one(x)))) * float(m.one(x)[0, 0, 0, 0]), "one.0", "fixed places"),
    "roll": (lambda m, x: m.head(nets.pooled(m.two(m.one(x).roll(1, 1)))), "one.0", "roll mixes them"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOCKED)
def test_what_cannot_be_removed_is_locked_and_says_why(name):
    way, group, reason = LOCKED[name]
    torch.manual_seed(0)
    groups = {group.name: group for group in channel_groups(one_layer(way), torch.randn(2, 3, 8, 8))}
    assert groups[group].locked
    assert reason in groups[group].reason
    assert {"one.0", "two.0"} - {group} <= {other.name for other in groups.values() if not other.locked}
    assert groups["head"].reason == "it is an output of the model"


def test_the_classifiers_of_the_library():
    torch.manual_seed(0)
    images = torch.randn(2, 1, 28, 28)
    groups = channel_groups(ConvNet(width=4, depth=3), images)
    assert {group.name: group.scale for group in groups if not group.locked} == {
        "stem": (14, 14),
        "blocks.0.pointwise": (14, 14),
        "blocks.1.pointwise": (7, 7),
        "blocks.2.pointwise": (4, 4),
    }
    vit = ViT(num_classes=10, in_channels=1, image_size=28, patch_size=7, dim=16, depth=2, heads=2)
    assert [group.name for group in channel_groups(vit, images) if not group.locked] == [
        "blocks.0.mlp.fc1",
        "blocks.1.mlp.fc1",
    ]


def test_bad_input():
    model, images = build(nets.plain)
    with pytest.raises(
        InputError, match=r"example_input must be what the model's forward takes, got \[2, 4, 8, 8\] \(.*channels"
    ):
        channel_groups(model, torch.randn(2, 4, 8, 8))
    with pytest.raises(TypeError, match="model must be a Module, got int"):
        channel_groups(3, images)
    groups = channel_groups(model, images)
    with pytest.raises(InputError, match=r"kept\['one.0'\] must keep at least one unit, got none"):
        shrink_channels(model, groups, {"one.0": torch.zeros(8, dtype=torch.bool)})
    with pytest.raises(InputError, match=r"kept must name groups of the model, got one \(did you mean 'one.0'\?\)"):
        shrink_channels(model, groups, {"one": torch.ones(8, dtype=torch.bool)})
    with pytest.raises(InputError, match=r"must have shape \[8\], got \[9\]"):
        channel_masks(model, groups, {"one.0": torch.ones(9, dtype=torch.bool)})
    with pytest.raises(InputError, match="kept must keep all of a locked group, got less of head"):
        channel_masks(model, groups, {"head": torch.arange(5) > 0})
    with pytest.raises(InputError, match="groups must be those of this model"):
        shrink_channels(build(nets.residual)[0], groups, {"one.0": torch.arange(8) > 0})
    with pytest.raises(InputError, match="state must have exactly the tensors of the model"):
        fit_to(model, {})
    wider = {
        name: value.repeat(2, *[1] * (value.ndim - 1)) if value.ndim else value
        for name, value in model.state_dict().items()
    }
    with pytest.raises(
        InputError, match=r"state must have tensors no larger than the model's, got one.0.weight of shape"
    ):
        fit_to(model, wider)
