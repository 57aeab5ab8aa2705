"""Masks through every kind of layer and optimizer, skipped and accumulated steps, copies, averages."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers.pytorch_utils import Conv1D

from paucity.checks import InputError
from paucity.ops.formats import Masks, average_models


class Experts(nn.Module):
    """A stack of expert matrices as one parameter, mixed by a router."""

    def __init__(self):
        super().__init__()
        self.router, self.up_proj = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x):
        return torch.einsum("be,eoi,bi->bo", self.router(x).softmax(-1), self.up_proj, x)


LAYERS = {
    "linear": (nn.Linear(6, 4), (3, 6), "weight"),
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9), "weight"),
    "conv2d": (nn.Conv2d(3, 4, 3), (2, 3, 5, 5), "weight"),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3), "weight"),
    "transformers conv1d": (Conv1D(4, 6), (3, 6), "weight"),
    "embedding": (nn.Embedding(9, 6), 9, "weight"),
    "sparse gradient": (nn.Embedding(9, 6, sparse=True), 9, "weight"),
    "experts": (Experts(), (3, 6), "up_proj"),
    "transposed conv": (nn.ConvTranspose2d(3, 4, 2), (2, 3, 3, 3), "weight"),
    "attention": (nn.MultiheadAttention(8, 2), None, "in_proj_weight"),
}
OPTIMIZERS = {
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "sgd maximize": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, maximize=True, foreach=True),
}


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


def make_masks(model, seed=1):
    gen = torch.Generator().manual_seed(seed)
    return Masks({n: torch.rand(p.shape, generator=gen) < 0.5 for n, p in model.named_parameters() if p.ndim > 1})


def loss_of(model, seed=0):
    return (model(torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))) - 1).square().mean()


def train(model, optimizer, steps=3):
    for seed in range(steps):

        def closure(seed=seed):
            optimizer.zero_grad()
            loss = loss_of(model, seed)
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind):
    template, shape, name = LAYERS[kind]
    layer = copy.deepcopy(template)
    masks = Masks({name: torch.rand(layer.get_parameter(name).shape) < 0.4}, nominal=0.6)
    sparse = kind == "sparse gradient"
    optimizer = torch.optim.SparseAdam(layer.parameters()) if sparse else torch.optim.AdamW(layer.parameters())
    masks.install(optimizer, layer)
    before = layer.get_parameter(name).detach().clone()
    for _ in range(3):
        x = torch.arange(shape) if isinstance(shape, int) else torch.randn(shape or (3, 2, 8))
        out = layer(x, x, x)[0] if shape is None else layer(x)
        optimizer.zero_grad()
        (out - 1).square().sum().backward()
        optimizer.step()
        assert masks.violations(layer) == {}
    kept = masks[name]
    changed = layer.get_parameter(name)[kept] != before[kept]
    assert changed.all(), "kept entries train"
    assert masks.achieved_in(layer) == masks.sparsity(layer)
    assert Masks.from_zeros(layer, [name]) == masks


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_with_other_state_and_other_kernels(name):
    model = make_model()
    masks = make_masks(model)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    train(model, optimizer, steps=1)  # the state is dense before
    masks.install(optimizer, model)
    for _ in range(3):
        train(model, optimizer, steps=2)
        assert masks.violations(model) == {}
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
        assert all(model.get_parameter(which)[mask].all() for which, mask in masks.items())


@pytest.mark.parametrize("fused", [False, True])
def test_accumulation_and_skipped_steps(fused):
    model = make_model()
    masks = make_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    masks.install(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        optimizer.zero_grad()
        for micro in range(3):  # gradients of removed entries pile up
            scaler.scale(loss_of(model, 3 * step + micro)).backward()
        if skipped := step == 1:
            model[0].weight.grad[0, 0] = float("inf")
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[0].weight, before) == skipped
        assert masks.violations(model) == {}
    assert scaler.get_scale() == 2.0


def test_copies_have_zeros_but_not_the_hook():
    model = make_model()
    masks = make_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.install(optimizer, model)
    train(model, optimizer)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    assert masks.violations(twin) == {}
    train(twin, its_optimizer)
    assert set(masks.violations(twin)) == set(masks)
    copy.deepcopy(masks).install(its_optimizer, twin)
    train(twin, its_optimizer)
    assert masks.violations(twin) == masks.violations(model) == {}


def test_dtype_change_and_two_optimizers():
    model = make_model()
    masks = make_masks(model)
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    for optimizer in optimizers:
        masks.install(optimizer, model)
    model.double()
    for optimizer in optimizers:
        optimizer.zero_grad()
    (model(torch.randn(4, 5).double()) - 1).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert model[0].weight.dtype == torch.float64
    assert masks.violations(model) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_model_moved_after_install():
    model = make_model()
    masks = make_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks.install(optimizer, model)
    model.cuda()
    (model(torch.randn(4, 5, device="cuda")) - 1).square().sum().backward()
    optimizer.step()
    assert masks.violations(model) == {}
    assert masks.achieved_in(model) == masks.sparsity(model)


def test_moving_average_that_began_dense_needs_one_apply():
    model = make_model()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    masks = make_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks.install(optimizer, model)
    for _ in range(3):
        train(model, optimizer)
        averaged.update_parameters(model)
    assert set(masks.violations(averaged)) == set(masks), "what was dense fades and never ends"
    masks.apply_(averaged)
    train(model, optimizer)
    averaged.update_parameters(model)
    assert masks.violations(averaged) == {}


@pytest.mark.parametrize("keep", ["union", "intersection"])
def test_average_of_different_masks(keep):
    models = [make_model(seed) for seed in range(3)]
    masks = [make_masks(model, seed) for seed, model in enumerate(models)]
    for mask, model in zip(masks, models, strict=True):
        mask.apply_(model)
    average, merged = average_models(models, masks, keep=keep, shares=[1, 2, 1])
    for name, parameter in average.named_parameters():
        parts = [model.get_parameter(name).detach().flatten().tolist() for model in models]
        kept = [mask[name].flatten().tolist() if name in mask else [True] * len(parts[0]) for mask in masks]
        for i, value in enumerate(parameter.flatten().tolist()):
            stays = (any if keep == "union" else all)(row[i] for row in kept)
            assert value == pytest.approx((parts[0][i] + 2 * parts[1][i] + parts[2][i]) / 4 if stays else 0, abs=1e-6)
    assert merged.violations(average) == {}
    sparsities = [mask.sparsity().achieved for mask in masks]
    inside = merged.sparsity().achieved
    assert inside <= min(sparsities) if keep == "union" else inside >= max(sparsities)


def test_average_of_equal_masks_keeps_sparsity_and_refusals():
    models = [make_model(seed).bfloat16() for seed in range(2)]
    masks = make_masks(models[0])
    masks.nominal = 0.5
    with pytest.raises(InputError, match=r"models must obey their masks \(apply_ them first\), got \d+ entries"):
        average_models(models, [masks])
    for model in models:
        masks.apply_(model)
    average, merged = average_models(models, [masks])
    assert (merged, merged.nominal, average[0].weight.dtype) == (masks, 0.5, torch.bfloat16)
    assert masks.achieved_in(average) == masks.sparsity(average)
    for bad, message in (
        ({"models": []}, "models must hold at least one"),
        ({"masks": [masks] * 3}, "masks must be one for each of 2 models, got 3"),
        ({"shares": [1.0]}, "shares must be one for each of 2 models, got 1"),
        ({"shares": [0.0, 0.0]}, "shares must have a positive sum"),
        ({"shares": [-1.0, 2.0]}, r"shares must be in \[0, inf\)"),
        ({"keep": "all"}, "keep must be one of intersection, union"),
        ({"models": [models[0], nn.Linear(2, 2)]}, "models must have the same parameters and buffers"),
    ):
        with pytest.raises(InputError, match=message):
            average_models(**({"models": models, "masks": [masks]} | bad))
