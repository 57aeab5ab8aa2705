"""Training of image classifiers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paucity.checks import InputError
from paucity.measure.images import Images
from paucity.ops.formats import Masks
from paucity.training import learning_rate_at, num_steps, train


def problem(count=96, seed=0):
    """Three classes told apart by the brightest third of the picture."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    pixels = 0.3 * torch.randn(count, 1, 6, 6, generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[0, 2 * label : 2 * label + 2] += 1
    return Images(pixels, labels, "stripes")


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def state(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def test_learns_and_is_deterministic():
    images, models = problem(), [classifier(), classifier()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    histories = [train(model, images, epochs=6, batch_size=16, seed=3, shift=1) for model in models]
    assert torch.rand(1) == expected  # the caller's random numbers
    assert histories[0].losses == histories[1].losses
    assert torch.equal(state(models[0]), state(models[1]))
    assert histories[0].num_steps == len(histories[0].losses) == 36
    assert sum(histories[0].losses[-6:]) < 0.3 * sum(histories[0].losses[:6])
    assert not models[0].training
    other = classifier()
    train(other, images, epochs=6, batch_size=16, seed=4, shift=1)
    assert not torch.equal(state(models[0]), state(other))


def test_one_step_by_hand():
    images, model, by_hand = problem(16), classifier(), classifier()
    train(model, images, epochs=1, batch_size=16, learning_rate=0.5, weight_decay=0.01, schedule="constant")
    by_hand.train()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(by_hand(images.pixels[order]), images.labels[order]).backward()
    with torch.no_grad():
        for parameter in by_hand.parameters():
            slope = parameter.grad + (0.01 * parameter if parameter.ndim > 1 else 0)
            parameter -= 0.5 * 1.9 * slope  # Nesterov: the first velocity counts once more, times the momentum
    torch.testing.assert_close(state(model), state(by_hand), rtol=1e-5, atol=1e-6)


def test_masks_hold_and_go():
    images, model = problem(), classifier()
    masks = Masks({"1.weight": torch.rand(16, 36, generator=torch.Generator().manual_seed(0)) < 0.4})
    train(model, images, epochs=2, batch_size=16, masks=masks)
    assert not model.get_parameter("1.weight")[~masks["1.weight"]].any()
    train(model, images, epochs=1, batch_size=16)
    assert model.get_parameter("1.weight")[~masks["1.weight"]].any()


def test_parts_of_a_training_are_the_whole_without_momentum():
    images, whole, parts = problem(), classifier(), classifier()
    options = {"epochs": 3, "batch_size": 16, "momentum": 0.0, "learning_rate": 0.1}
    all_losses = train(whole, images, **options).losses
    first = train(parts, images, max_steps=7, **options).losses
    assert first + train(parts, images, start_step=7, **options).losses == all_losses
    assert torch.equal(state(whole), state(parts))


def test_on_step_sees_every_step_before_it_is_taken():
    images, model, seen = problem(), classifier(), []

    def look(step):
        assert step.model is model
        assert step.model.training
        seen.append((step.index, step.total, step.optimizer.param_groups[0]["lr"]))

    train(model, images, epochs=2, batch_size=40, on_step=look)
    assert seen == [(i, 4, 0.1 * learning_rate_at(i, 4)) for i in range(4)]


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "constant"])
def test_learning_rates(schedule):
    factors = [learning_rate_at(step, 100, schedule) for step in range(100)]
    assert max(factors) == 1
    assert min(factors) > 0
    top = factors.index(1)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


def test_teacher():
    images, teacher, pupil = problem(), classifier(1), classifier()
    train(teacher, images, epochs=6, batch_size=16)
    wrong = Images(images.pixels, torch.zeros_like(images.labels), "zeros")
    train(pupil, wrong, epochs=6, batch_size=16, teacher=teacher, teacher_weight=1.0)
    guesses = [model(images.pixels).argmax(-1) for model in (pupil, teacher)]
    assert (guesses[0] == guesses[1]).float().mean() > 0.9


def test_bad_input():
    images, model = problem(), classifier()
    before = state(model)
    assert num_steps(10, 3, 128) == 3
    with pytest.raises(InputError, match="train: images must be Images, got Tensor"):
        train(model, images.pixels, epochs=1)
    with pytest.raises(InputError, match=r"schedule must be one of .*, got cosin \(did you mean 'cosine'\?\)"):
        train(model, images, epochs=1, schedule="cosin")
    with pytest.raises(InputError, match=r"momentum must be in \[0, 1\), got 1"):
        train(model, images, epochs=1, momentum=1)
    with pytest.raises(InputError, match="masked name must be a parameter"):
        train(model, images, epochs=1, masks=Masks({"x": torch.ones(1, dtype=torch.bool)}))
    with pytest.raises(InputError, match="give logits of 8 classes"):
        train(model, Images(images.pixels, images.labels + 5, "more"), epochs=1)
    for frozen in (nn.Flatten(), classifier().requires_grad_(False)):
        with pytest.raises(InputError, match="train: model must have a parameter to train, got none"):
            train(frozen, images, epochs=1)
    assert torch.equal(before, state(model))
    with pytest.raises(InputError, match="learning_rate must keep the loss finite, got nan at step"):
        train(model, Images(images.pixels * 1e38, images.labels, "huge"), epochs=9)
