"""Group channel pruning: the varying rate, thresholds for each group, attention maps, and the three stages together."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paucity.checks import InputError
from paucity.measure.images import Images, accuracy
from paucity.models.vision import ConvNet
from paucity.training import train
from paucity.weights.attention_maps import attention_loss, attention_map
from paucity.weights.group_channel import (
    at_parameters,
    divide,
    group_channel_prune,
    group_sparsities,
    group_thresholds,
    last_norms,
)
from paucity.weights.group_scales import VaryingRate, scale_scores, sparse_scales
from paucity.weights.structured.channels_groups import channel_groups
from paucity.weights.structured.channels_shrink import shrink_channels


@pytest.fixture
def images():
    """Rows, columns, squares or nothing, among noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 4
    rows, columns = torch.meshgrid(torch.arange(8) % 2, torch.arange(8) % 2, indexing="ij")
    patterns = torch.stack([rows, columns, rows ^ columns, torch.zeros(8, 8)]).float()
    pixels = patterns[labels].unsqueeze(1) + torch.randn(256, 1, 8, 8, generator=generator) * 0.3
    return Images(pixels, labels, "patterns")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return ConvNet(num_classes=4, width=4, depth=3, image_size=8)


def task(model, pixels, labels):
    return F.cross_entropy(model(pixels), labels)


def test_the_rate_varies_as_by_hand():
    scales = {"a": torch.tensor([0.1, -0.9, 0.5, 0.3]), "b": torch.tensor([0.8, 0.2, 0.05, -0.7])}
    rate = VaryingRate(rate=1e-2, start=0.5, share=0.75, lowered=0.1)
    assert all(torch.equal(value, torch.full((4,), 1e-2)) for value in rate.rates(scales, 0.5).values())
    later = rate.rates(scales, 0.6)  # the two largest of eight in absolute value: 0.9 and 0.8
    torch.testing.assert_close(later["a"], torch.tensor([1e-2, 1e-3, 1e-2, 1e-2]))
    torch.testing.assert_close(later["b"], torch.tensor([1e-3, 1e-2, 1e-2, 1e-2]))
    assert torch.equal(VaryingRate(lowered=1.0).rates(scales, 1.0)["a"], torch.full((4,), 1e-3))


def test_the_penalty_is_the_gradient_of_the_sum_of_absolute_scales(net, images):
    groups = channel_groups(net, images.pixels[:2])
    names = [name for name, p in net.named_parameters() if "norm" in name and name.endswith("weight")]
    net.train()
    parameters = dict(net.named_parameters())
    plain = torch.autograd.grad(task(net, images.pixels, images.labels), list(parameters.values()))
    with sparse_scales(net, groups, VaryingRate(rate=0.25)):
        penalised = torch.autograd.grad(task(net, images.pixels, images.labels), list(parameters.values()))
    after = torch.autograd.grad(task(net, images.pixels, images.labels), list(parameters.values()))
    for name, one, other, third in zip(parameters, plain, penalised, after, strict=True):
        extra = 0.25 * parameters[name].sign() if name in names else torch.zeros_like(one)
        torch.testing.assert_close(other - one, extra, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(third, one)


def test_sparse_training_pulls_scales_down_and_a_varying_rate_leaves_the_large_ones(net, images):
    def trained(rate):
        model = copy.deepcopy(net)
        groups = channel_groups(model, images.pixels[:2])
        with sparse_scales(model, groups, rate) as on_step:
            train(model, images, epochs=8, batch_size=64, learning_rate=0.1, on_step=on_step)
        return torch.cat(list(scale_scores(model, groups).values()))

    free, constant = trained(VaryingRate(rate=0.0)), trained(VaryingRate(rate=0.03, lowered=1.0))
    varying = trained(VaryingRate(rate=0.03))
    assert float(constant.median()) < 0.8 * float(free.median())
    top = len(varying) // 4
    assert float(varying.topk(top).values.mean()) > 1.02 * float(constant.topk(top).values.mean())


def test_layers_are_divided_by_scale_and_part_and_keep_their_best(net, images):
    groups = channel_groups(net, images.pixels[:2])
    division = divide(net, groups)
    assert division == {
        "8x8": ["stem", "blocks.0.pointwise"],
        "4x4": ["blocks.1.pointwise"],
        "2x2": ["blocks.2.pointwise"],
    }
    assert list(divide(net, groups, parts=["blocks"])) == ["8x8", "blocks 8x8", "blocks 4x4", "blocks 2x2"]
    assert last_norms(net, groups, division) == ["blocks.1.norm1", "blocks.2.norm1", "blocks.2.norm2"]
    for name, scale in net.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.uniform_(scale, 0.1, 1)
    scores = scale_scores(net, groups)
    expected = torch.maximum(net.stem_norm.weight.abs(), net.blocks[0].norm1.weight.abs()).detach()
    torch.testing.assert_close(scores["stem"], expected)
    kept = group_thresholds(net, groups, division, {"8x8": 0.5, "4x4": 0.75, "2x2": 0.0})
    both = torch.cat([scores["stem"], scores["blocks.0.pointwise"]])
    assert torch.equal(torch.cat([kept["stem"], kept["blocks.0.pointwise"]]), both >= both.topk(6).values.min())
    assert [int(kept[name].sum()) for name in ("blocks.1.pointwise", "blocks.2.pointwise")] == [4, 32]


def test_a_group_that_a_threshold_would_empty_keeps_its_share(net, images):
    groups = channel_groups(net, images.pixels[:2])
    with torch.no_grad():
        net.stem_norm.weight.mul_(1e-6), net.blocks[0].norm1.weight.mul_(1e-6)
    everything = {"all": list(scale_scores(net, groups))}
    kept = group_thresholds(net, groups, everything, {"all": 0.5}, least=0.5)
    assert int(kept["stem"].sum()) == 2
    assert int(group_thresholds(net, groups, everything, {"all": 0.5})["stem"].sum()) == 1


def test_sparsities_go_where_they_cost_least(net, images):
    """Only the last stage may lose channels for free: there the search takes what it can."""
    train(net, images, epochs=4, batch_size=64)
    groups = channel_groups(net, images.pixels[:2])
    division = divide(net, groups)
    with torch.no_grad():
        net.blocks[2].norm2.weight[8:] *= 1e-4
        net.blocks[2].norm2.bias[8:] *= 1e-4
    before = copy.deepcopy(net.state_dict())
    found = group_sparsities(
        net, groups, division, sparsity=0.4, loss=lambda m: float(task(m, images.pixels, images.labels))
    )
    assert found["2x2"] > 2 * max(found["8x8"], found["4x4"])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_the_share_of_parameters_is_met(net, images):
    groups = channel_groups(net, images.pixels[:2])
    everything = {"all": list(scale_scores(net, groups))}
    kept = at_parameters(net, groups, lambda s: group_thresholds(net, groups, everything, {"all": s}), parameters=0.4)
    smaller = shrink_channels(net, groups, kept)
    share = sum(p.numel() for p in smaller.parameters()) / sum(p.numel() for p in net.parameters())
    assert share == pytest.approx(0.4, abs=0.03)


def test_attention_maps_as_by_loops_and_their_loss(net, images):
    features = torch.randn(2, 3, 4, 5)
    for image, row in zip(features, attention_map(features), strict=True):
        naive = torch.tensor(
            [[sum(float(image[c, i, j]) ** 2 for c in range(3)) / 3 for j in range(5)] for i in range(4)]
        )
        torch.testing.assert_close(row, (naive / naive.square().sum().sqrt()).flatten())
    teacher, layers = copy.deepcopy(net), {"blocks.0": 10.0, "stem": 5.0}
    with attention_loss(net.eval(), teacher, layers, task) as loss:
        same = loss(net, images.pixels, images.labels)
        torch.testing.assert_close(same, task(net, images.pixels, images.labels))
        with torch.no_grad():
            net.stem.weight.normal_()
        with_maps = loss(net, images.pixels, images.labels)
        expected = task(net, images.pixels, images.labels)
        stems = [network.stem(images.pixels) for network in (net, teacher.eval())]
        first = [
            network.blocks[0](F.relu(network.stem_norm(stem)))
            for network, stem in zip((net, teacher), stems, strict=True)
        ]
        for (one, other), beta in ((stems, 5.0), (first, 10.0)):
            expected = expected + beta * (attention_map(one) - attention_map(other)).square().sum(1).mean()
        torch.testing.assert_close(with_maps, expected)
        assert with_maps.item() > 1.01 * same.item()
        with_maps.backward()
    assert net.stem.weight.grad is not None
    assert teacher.stem.weight.grad is None
    assert not net.stem._forward_hooks
    assert not teacher.stem._forward_hooks


def test_three_stages_leave_a_small_network_that_works(net, images):
    train(net, images, epochs=8, batch_size=64)
    before = copy.deepcopy(net.state_dict())
    done = group_channel_prune(
        net, images, parameters=0.4, sparse_epochs=6, distil_epochs=6, batch_size=64, rate=VaryingRate(rate=1e-2)
    )
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert done.parameters == pytest.approx(0.4, abs=0.05)
    assert set(done.sparsities) == {"8x8", "4x4", "2x2"}
    assert accuracy(done.model, images).value > 0.9
    assert sum(p.numel() for p in done.model.parameters()) < sum(p.numel() for p in done.teacher.parameters())


def test_bad_input(net, images):
    groups = channel_groups(net, images.pixels[:2])
    division = divide(net, groups)
    for field, value in (("rate", -1.0), ("start", 2.0), ("share", 1.0), ("lowered", 1.5)):
        with pytest.raises(InputError, match=f"VaryingRate: {field} must"):
            VaryingRate(**{field: value})
    with pytest.raises(InputError, match="sparsities must be given for 8x8, 4x4, 2x2, got 8x8"):
        group_thresholds(net, groups, division, {"8x8": 0.5})
    with pytest.raises(InputError, match="sparsity must be in"):
        group_thresholds(net, groups, division, dict.fromkeys(division, 1.0))
    with pytest.raises(InputError, match=r"division must hold names of stem.*, got head"):
        group_thresholds(net, groups, {"all": ["head"]}, {"all": 0.5})
    with pytest.raises(InputError, match="parts must each hold channels that can be removed, got neck"):
        divide(net, groups, parts=["neck"])
    with pytest.raises(InputError, match="groups must have norms with scales"):
        divide(net, [group for group in groups if group.locked])
    with (
        pytest.raises(InputError, match="groups must have norms with scales, which can be trained to zero, got none"),
        sparse_scales(net, [], VaryingRate()),
    ):
        pass
    with (
        pytest.raises(InputError, match="layers must be modules of both networks, got neck"),
        attention_loss(net, net, {"neck": 1.0}, task),
    ):
        pass
    with pytest.raises(InputError, match="features must have 4 dimensions"):
        attention_map(torch.ones(2, 3))
    for share in (0.0, 1.0):
        with pytest.raises(InputError, match="parameters must"):
            group_channel_prune(net, images, parameters=share)


def test_a_classifier_with_norms_of_its_own_has_no_map_to_distil(images):
    def convs(*more):
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), *more]
        return nn.Sequential(*layers, nn.Linear(16, 4))

    conv = (nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    vgg = convs(*conv, nn.Flatten(), nn.Linear(256, 16), nn.BatchNorm1d(16), nn.ReLU())
    pooled = convs(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(16))  # a flat norm of the last channels
    for net in (vgg, pooled):
        groups = channel_groups(net, images.pixels[:2])
        assert last_norms(net, groups, divide(net, groups)) == ["1", "5"]
        done = group_channel_prune(net, images, parameters=0.5, sparse_epochs=1, distil_epochs=1)
        assert done.parameters < 0.7
