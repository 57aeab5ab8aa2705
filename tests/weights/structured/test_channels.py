"""Channel pruning as a call and as a step: scores against loops, allocations, rounding, removal and what undoes it."""

import copy

import pytest
import torch
import transformers
from torch import nn

from paucity.checks import InputError
from paucity.measure.data import data_file
from paucity.measure.images import accuracy, read_images
from paucity.models.load import Loaded
from paucity.models.norms import recalibrate_norms
from paucity.models.save import save
from paucity.models.vision import ConvNet
from paucity.weights.apply import apply_step, options_for
from paucity.weights.structured.channels import ChannelsOptions, choose_channels
from paucity.weights.structured.channels_groups import channel_groups
from paucity.weights.structured.channels_scores import channel_scores
from paucity.weights.structured.channels_shrink import channel_masks, shrink_channels

from . import channel_nets as nets


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(32, 3, 8, 8), torch.randint(5, (32,))) for _ in range(2)]


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = nets.residual().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    return model


def filters(net, order):
    """Naive: the stem's group by loops over the two layers that make its channels."""
    rows = []
    for layer in (net.stem[0], net.b[0]):
        row = [float(sum(abs(w) ** order for w in layer.weight[c].flatten().tolist())) ** (1 / order) for c in range(8)]
        rows.append(torch.tensor(row) / (sum(row) / 8))
    return torch.stack(rows).mean(0)


def test_scores_as_by_loops(net, batches):
    groups = channel_groups(net, batches[0][0][:2])
    for score, order in (("l1", 1), ("l2", 2)):
        torch.testing.assert_close(
            channel_scores(net, groups, score)["stem.0"], filters(net, order), rtol=1e-4, atol=1e-5
        )
    scales = torch.stack([net.stem[1].weight, net.b[1].weight]).abs().mean(0).detach()
    torch.testing.assert_close(channel_scores(net, groups, "bn")["stem.0"], scales)

    gradients = []
    for images, labels in batches:
        net.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        gradients.append([layer.weight.grad.square() for layer in (net.stem[0], net.b[0])])
    mean = [sum(grads) / len(batches) for grads in zip(*gradients, strict=True)]
    layers = zip((net.stem[0], net.b[0]), mean, strict=True)
    taylor = sum((layer.weight.square() * square).flatten(1).sum(1) for layer, square in layers).detach()
    torch.testing.assert_close(channel_scores(net, groups, "taylor", batches=batches)["stem.0"], taylor)

    seen = {}
    readers = {"a": net.a[0], "short": net.short, "c": net.c[0]}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, layer in readers.items()
    ]
    with torch.no_grad():
        for images, _ in batches:
            net(images)
    for hook in hooks:
        hook.remove()
    rows = []
    for name, layer in readers.items():
        norm = torch.cat(seen[name]).square().sum((0, 2, 3)).sqrt()
        row = layer.weight.abs().sum((0, 2, 3)) * norm
        rows.append((row / row.mean()).detach())
    wanda = channel_scores(net, groups, "wanda", batches=batches)["stem.0"]
    torch.testing.assert_close(wanda, torch.stack(rows).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("allocation", ["uniform", "erk", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.99])
def test_allocations_keep_what_they_should(net, batches, allocation, sparsity):
    before = copy.deepcopy(net.state_dict())
    choice = choose_channels(net, batches, sparsity=sparsity, allocation=allocation)
    counts = {name: (int(mask.sum()), len(mask)) for name, mask in choice.kept.items()}
    assert all(count >= 1 for count, _ in counts.values())
    if sparsity == 0:
        assert all(count == size for count, size in counts.values())
    elif sparsity == 0.99:
        assert allocation != "uniform" or {count for count, _ in counts.values()} == {1}
    elif allocation == "uniform":
        assert counts == {"stem.0": (6, 8), "a.0": (7, 10), "short": (8, 12), "c.0": (4, 6)}
    elif allocation == "global":
        assert sum(count for count, _ in counts.values()) == 36 - round(0.3 * 36)
    scores = channel_scores(net, choice.groups, "l2")
    for name, mask in choice.kept.items():
        assert bool(mask.all()) or float(scores[name][mask].min()) >= float(scores[name][~mask].max())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_rounding_and_ignored_groups(net, batches):
    choice = choose_channels(net, batches, sparsity=0.5, round_to=4, ignore=["a.*"])
    assert {name: int(mask.sum()) for name, mask in choice.kept.items()} == {"stem.0": 4, "short": 8, "c.0": 4}
    assert "a.0 keeps its 10: it is to be ignored" in choice.notes
    assert int(choose_channels(net, batches, sparsity=0.1, round_to=8).kept["c.0"].sum()) == 6


@pytest.mark.parametrize("shrink", [True, False])
def test_the_step_removes_and_brings_back(net, batches, shrink):
    net.train()
    dense, before = net(batches[0][0]).detach(), copy.deepcopy(net.state_dict())
    net.load_state_dict(before)
    parameters = dict(net.named_parameters())
    size = sum(p.numel() for p in net.parameters())
    options = options_for("channels")(sparsity=0.5, shrink=shrink)
    applied = apply_step(Loaded(net, None, "net"), "channels", options, batches)
    assert net.training
    assert (sum(p.numel() for p in net.parameters()) < 0.5 * size) == shrink
    state = applied.state()
    assert state["kept"]["stem.0"] == [4, 8]
    assert state["sparsity"] == pytest.approx(0.65, abs=0.15)
    assert 0 < applied.density()["stem.0.weight"] < 1
    applied.remove()
    assert dict(net.named_parameters()) == parameters
    assert net.stem[0].out_channels == 8
    assert net.stem[1].num_features == 8
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    torch.testing.assert_close(net(batches[0][0]), dense)


def test_zeros_and_removal_agree_with_norms_measured_anew(net, batches):
    images = batches[0][0]
    results = []
    for shrink in (True, False):
        model = copy.deepcopy(net)
        apply_step(Loaded(model, None, "net"), "channels", ChannelsOptions(shrink=shrink), batches)
        results.append(model(images))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_norms_measured_anew_are_means_over_the_batches(net, batches):
    images = [pixels for pixels, _ in batches]
    undo = recalibrate_norms(net, images)
    seen = torch.stack([net.stem[0](pixels).mean((0, 2, 3)) for pixels in images]).mean(0)
    torch.testing.assert_close(net.stem[1].running_mean, seen.detach())
    assert (net.stem[1].momentum, net.training, int(net.stem[1].num_batches_tracked)) == (0.1, False, 0)
    undo()
    assert not bool(net.stem[1].running_mean.any())
    with pytest.raises(InputError, match="batches must hold at least one batch"):
        recalibrate_norms(net, [])


def resnet20():
    """The trained one of PAUCITY_DATA, its blocks under the names that the file has."""
    path = data_file("resnet_cifar10/resnet20.npz", address="https://github.com/akamaster/pytorch_resnet_cifar10")
    import numpy as np

    model = nets.ResNet20().eval()
    with np.load(path, allow_pickle=False) as data:
        state = {name: torch.from_numpy(value) for name, value in data.items()}
    model.load_state_dict(state, strict=False)
    return model


def test_a_real_resnet_keeps_its_accuracy():
    statistics = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    try:
        model = resnet20()
        images = read_images("cifar10", "train", limit=128, **statistics)
        test = read_images("cifar10", "test", limit=150, **statistics)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert accuracy(model, test).value > 0.9
    choice = choose_channels(model, images.batches(64), sparsity=0.2, score="l1")
    sizes = {group.name: group.size for group in choice.groups if not group.locked}
    assert sizes["conv1"] == 16  # with the middle channels of every stage
    assert len(sizes) == 10  # and one inside each block
    assert {group.size for group in choice.groups if "padding" in group.reason and "conv2" in group.name} == {16, 32}
    smaller = shrink_channels(model, choice.groups, choice.kept)
    masked = copy.deepcopy(model)
    channel_masks(model, choice.groups, choice.kept).apply_(masked)
    with torch.no_grad():
        torch.testing.assert_close(smaller(test.pixels[:50]), masked(test.pixels[:50]), rtol=1e-3, atol=1e-3)
    recalibrate_norms(smaller, images.batches(64))
    random = choose_channels(model, images.batches(64), sparsity=0.2, score="random")
    control = shrink_channels(model, random.groups, random.kept)
    recalibrate_norms(control, images.batches(64))
    assert accuracy(smaller, test).value > max(0.6, accuracy(control, test).value)


def test_bad_input(net, batches):
    with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\), got 1"):
        choose_channels(net, batches, sparsity=1.0)
    with pytest.raises(InputError, match="calibration must hold at least one batch of images, got none"):
        choose_channels(net, [])
    with pytest.raises(InputError, match=r"score must be one of .*wanda.*, got wnada"):
        choose_channels(net, batches, score="wnada")
    with pytest.raises(InputError, match="allocation must be one of"):
        choose_channels(net, batches, allocation="owl")
    with pytest.raises(InputError, match="round_to must be"):
        choose_channels(net, batches, round_to=0)
    with pytest.raises(InputError, match=r"ignore must name groups of the model \(stem.0, a.0, short, c.0\), got tail"):
        choose_channels(net, batches, ignore=["tail"])
    with pytest.raises(InputError, match=r"hold \(inputs, labels\) where gradients are needed"):
        choose_channels(net, [images for images, _ in batches], score="taylor")
    with pytest.raises(InputError, match=r"example_input must be what the model's forward takes, got \[2, 1, 8, 8\]"):
        choose_channels(net, [torch.randn(4, 1, 8, 8)])
    with pytest.raises(InputError, match=r"model must have channels that can be removed, got .*1: it is an output"):
        choose_channels(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), [torch.randn(4, 3, 2, 2)])
    with torch.no_grad():
        net.c[0].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"model must have finite scores, got NaN or infinity in c.0"):
        choose_channels(net, batches, score="l1")
    small = ConvNet(width=4, depth=3)
    applied = apply_step(Loaded(small, None, "net"), "channels", ChannelsOptions(), [torch.randn(8, 1, 28, 28)])
    assert "the statistics of norms stay: 64 images are needed to measure them anew" in applied.state()["notes"]


def test_a_shrunk_model_of_transformers_loads_anywhere(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
    model, images = transformers.ResNetForImageClassification(config).eval(), torch.randn(64, 3, 32, 32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    dense, shapes = model(images).logits, {name: value.shape for name, value in model.state_dict().items()}
    loaded, size = Loaded(model, None, "resnet"), sum(p.numel() for p in model.parameters())
    applied = apply_step(loaded, "channels", ChannelsOptions(), [images])
    assert sum(p.numel() for p in model.parameters()) < 0.6 * size
    assert any("filled up with zeros" in note for note in applied.state()["notes"])
    small = model(images).logits
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    save(loaded, tmp_path / "resnet")
    again, info = type(model).from_pretrained(tmp_path / "resnet", output_loading_info=True)
    assert not any(info[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    torch.testing.assert_close(again.eval()(images).logits, small, rtol=1e-4, atol=1e-4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    torch.testing.assert_close(model(images).logits, small)
    with pytest.raises(InputError, match="channels: model must be saved and loaded anew, as an earlier step fills up"):
        apply_step(loaded, "channels", ChannelsOptions(), [images])
    applied.remove()
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert not any(module._state_dict_hooks for module in model.modules())
    assert torch.equal(model(images).logits, dense)


@pytest.mark.parametrize("options", [{"sparsity": 0.0}, {"round_to": 64}, {"sparsity": 0.0, "shrink": False}])
def test_nothing_removed_is_said_and_leaves_the_model(net, batches, options):
    before = copy.deepcopy(net.state_dict())
    applied = apply_step(Loaded(net, None, "net"), "channels", ChannelsOptions(**options), batches)
    assert any("Nothing was removed" in note for note in applied.state()["notes"])
    assert (applied.masks, applied.density(), applied.state()["sparsity"]) == (None, {}, 0.0)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    applied.remove()
    groups = channel_groups(net, batches[0][0][:2])
    with pytest.raises(InputError, match="channel_masks: kept must remove at least one unit, got none removed"):
        channel_masks(net, groups, {"stem.0": torch.ones(8, dtype=torch.bool)})
