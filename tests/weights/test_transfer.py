"""Linear probes and visual prompts over a frozen model."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paucity.checks import InputError
from paucity.measure.images import Images, accuracy
from paucity.weights.transfer import LinearProbe, VisualPrompt, fit_images, label_mapping

SHAPE = (1, 12, 12)


def source():
    torch.manual_seed(3)
    layers = {"flat": nn.Flatten(), "fc": nn.Linear(144, 32), "norm": nn.BatchNorm1d(32), "act": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers | {"head": nn.Linear(32, 6)}))


def target(num=96, classes=3):
    """Squares in a corner that tells the class, of 8 pixels a side."""
    labels = torch.arange(num) % classes
    pixels = 0.1 * torch.randn(num, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for index, label in enumerate(labels.tolist()):
        pixels[index, :, 4 * (label // 2) : 4 * (label // 2) + 3, 4 * (label % 2) : 4 * (label % 2) + 3] += 2
    return Images(pixels, labels, "squares")


def frozen_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_probe_learns_and_leaves_the_model_as_it_was():
    model, images = source().train(), target()
    before = frozen_state(model)
    probe = LinearProbe(model, SHAPE, 3).fit(images, epochs=30, learning_rate=0.1)
    assert accuracy(probe, images).value > 0.9
    assert unchanged(model, before)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = LinearProbe(source(), SHAPE, 3).fit(images, epochs=30, learning_rate=0.1)
    assert torch.equal(probe.head.weight, again.head.weight)


def test_the_features_are_what_the_head_sees():
    model, images = source().eval(), target()
    probe = LinearProbe(model, SHAPE, 6)
    probe.head.load_state_dict(model.head.state_dict())
    assert torch.equal(probe(images.pixels), model(fit_images(images.pixels, SHAPE)))


def test_a_prompt_trains_its_frame_alone():
    model, images = source().train(), target()
    before = frozen_state(model)
    prompt = VisualPrompt(model, SHAPE, 3, border=2)
    with torch.no_grad():
        start = F.cross_entropy(prompt.eval()(images.pixels), images.labels)
    prompt.train()
    prompt.fit(images, epochs=8, batch_size=32)
    prompt.eval()
    with torch.no_grad():
        assert F.cross_entropy(prompt(images.pixels), images.labels) < start
        canvas = F.pad(fit_images(images.pixels, (1, 8, 8)), (2,) * 4) + prompt.prompt * prompt.frame
        assert torch.equal(prompt(images.pixels), model(canvas)[:, prompt.mapping])
    assert unchanged(model, before)
    assert torch.equal(prompt.frame.bool()[0], torch.ones(12, 12).bool().index_put_(
        (torch.arange(2, 10)[:, None], torch.arange(2, 10)), torch.tensor(False)
    ))  # fmt: skip
    assert (prompt.prompt[:, 2:10, 2:10] == 0).all()
    assert (prompt.prompt[:, :2] != 0).any()
    assert len(set(prompt.mapping.tolist())) == 3
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_prompted_forward_leaves_the_model_as_it_was():
    model, images = source().train(), target()
    before = frozen_state(model)
    prompt = VisualPrompt(model, SHAPE, 3, border=2).train()
    trained = prompt(images.pixels)
    assert trained.requires_grad
    assert model.training
    assert unchanged(model, before)
    assert torch.equal(trained, prompt.eval()(images.pixels))
    with torch.no_grad():
        assert not prompt(images.pixels).requires_grad


def test_modes_of_the_model_come_back_after_a_prompt():
    model = source().train()
    model.head.eval()
    VisualPrompt(model, SHAPE, 3, border=0).fit(target(32), epochs=1)
    assert model.training
    assert not model.head.training


def naive_mapping(answers, labels, num_source, num_target):
    pairs = sorted(
        ((-sum(a == s and t == k for a, t in zip(answers, labels, strict=True)), k, s))
        for k in range(num_target) for s in range(num_source)
    )  # fmt: skip
    found = {}
    for _, k, s in pairs:
        if k not in found and s not in found.values():
            found[k] = s
    return [found[k] for k in range(num_target)]


@pytest.mark.parametrize("seed", range(4))
def test_the_mapping_takes_the_most_frequent_pair_first(seed):
    generator = torch.Generator().manual_seed(seed)
    answers, labels = torch.randint(7, (60,), generator=generator), torch.randint(4, (60,), generator=generator)
    assert label_mapping(answers, labels, 7, 4).tolist() == naive_mapping(answers.tolist(), labels.tolist(), 7, 4)


def test_images_take_the_shape_of_the_source():
    pixels = torch.rand(2, 3, 8, 8)
    assert torch.allclose(fit_images(pixels, (1, 8, 8)), pixels.mean(1, keepdim=True))
    assert torch.equal(fit_images(pixels[:, :1], (3, 8, 8)), pixels[:, :1].repeat(1, 3, 1, 1))
    assert fit_images(pixels, (3, 5, 6)).shape == (2, 3, 5, 6)
    assert torch.allclose(fit_images(torch.full((1, 1, 8, 8), 0.3), (1, 28, 28)), torch.tensor(0.3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: LinearProbe(source(), SHAPE, 3, head="norm"),
            r"be a linear layer of the model \(it has fc, head\), got norm",
        ),
        (lambda: LinearProbe(nn.Conv2d(1, 1, 1), SHAPE, 3), r"be a linear layer of the model \(it has \)"),
        (lambda: LinearProbe(source(), SHAPE, 1), "num_classes must be at least 2"),
        (lambda: VisualPrompt(source(), SHAPE, 3, border=6), r"border must be in \[0, 5\], got 6"),
        (lambda: VisualPrompt(source(), SHAPE, 7).fit(target(32)), r"num_target must be in \[1, 6\], got 7"),
        (lambda: VisualPrompt(source(), SHAPE, 3).fit(target(32), epochs=0), "epochs must be at least 1"),
        (lambda: LinearProbe(source(), SHAPE, 3).fit(target(32), learning_rate=0), r"learning_rate must be in \(0"),
        (lambda: fit_images(torch.ones(1, 2, 4, 4), (3, 4, 4)), "pixels must have 1 or 3 channels, got 2"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
