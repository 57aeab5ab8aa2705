"""The same calls on image models: a ConvNet and a vision transformer, calibrated on pictures."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

from paucity.checks import InputError
from paucity.measure.images import Images
from paucity.models.hooks import input_norms
from paucity.models.load import Loaded
from paucity.models.sites import find_sites, weight_view
from paucity.models.vision import ConvNet, ViT
from paucity.training import train
from paucity.weights import prune
from paucity.weights.gradients import squared_gradients


def build(name):
    torch.manual_seed(0)
    if name == "convnet":
        return ConvNet(num_classes=4, width=8, depth=3, image_size=8).eval()
    return ViT(num_classes=4, image_size=8, dim=16, depth=2, heads=2).eval()


def pictures():
    generator = torch.Generator().manual_seed(0)
    return list(torch.split(torch.randn(24, 1, 8, 8, generator=generator), 8))


SITES = {"convnet": ("conv", "linear"), "vit": ("linear",)}


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_sparsity_everywhere(name, score):
    model = build(name)
    sites = ("conv",) if name == "convnet" else ("linear",)
    masks = prune(Loaded(model, None, name), score, sparsity=0.5, sites=sites, calibration=pictures())
    assert set(masks) == {site.name for site in find_sites(model, sites)}
    assert masks.achieved_in(model).achieved == pytest.approx(0.5, abs=0.03)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    assert model(pictures()[0]).shape == (8, 4)


@pytest.mark.parametrize(("name", "site"), [("convnet", "pointwise"), ("vit", "linear")])
@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_two_of_four_over_inputs(name, site, score):
    model = build(name)
    masks = prune(Loaded(model, None, name), score, n=2, m=4, sites=(site,), calibration=pictures())
    for _, mask in masks.items():
        assert (mask.flatten(1).unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_wanda_on_a_1x1_convolution_by_loops():
    model = build("convnet")
    site = next(s for s in find_sites(model, "pointwise") if s.layer == 0)
    seen = []
    hook = model.get_submodule(site.module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in pictures():
        model(batch)
    hook.remove()
    pixels = torch.cat(seen).movedim(1, -1).flatten(0, 2)
    norms = torch.stack([pixels[:, channel].square().sum().sqrt() for channel in range(pixels.shape[1])]).detach()
    torch.testing.assert_close(input_norms(model, [site], pictures())[site.name], norms)
    weight = weight_view(model, site).detach().clone()
    masks = prune(Loaded(model, None, "x"), "wanda", sparsity=0.5, sites=("pointwise",), calibration=pictures())
    for row, mask in zip(weight.flatten(1), masks[site.name].flatten(1), strict=True):
        scores = [float(abs(value) * norm) for value, norm in zip(row, norms, strict=True)]
        kept = sorted(range(len(scores)), key=lambda i: -scores[i])[: len(scores) // 2]
        assert sorted(kept) == mask.nonzero().flatten().tolist()


@pytest.mark.parametrize("name", SITES)
def test_fine_tuning_keeps_the_zeros(name):
    model = build(name)
    images = Images(torch.cat(pictures()), torch.arange(24) % 4, "noise")
    masks = prune(
        Loaded(model, None, name), "magnitude", sparsity=0.7, sites=("pointwise",) if name == "convnet" else ("linear",)
    )
    losses = train(model, images, epochs=10, batch_size=8, learning_rate=0.05, masks=masks).losses
    assert sum(losses[-3:]) < sum(losses[:3])
    assert masks.achieved_in(model).achieved == masks.sparsity().achieved


def test_kinds_of_convolutions():
    model = build("convnet")
    assert [site.name for site in find_sites(model, "depthwise")] == [f"blocks.{i}.depthwise.weight" for i in range(3)]
    assert [site.name for site in find_sites(model, "pointwise")] == [f"blocks.{i}.pointwise.weight" for i in range(3)]
    assert [site.name for site in find_sites(model, "spatial")] == ["stem.weight"]
    assert [site.kind for site in find_sites(model, "head")] == ["head"]
    assert len(find_sites(model, "conv")) == 7
    with pytest.raises(InputError, match=r"m must divide the input size of stem\.weight"):
        prune(Loaded(model, None, "x"), "magnitude", n=2, m=4, sites=("conv",))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "taylor"])
@pytest.mark.parametrize("order", ["dense", "block"])
def test_vision_models_of_transformers(method, order):
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**options, image_size=8, patch_size=4, num_channels=1, num_labels=4))
    labels = torch.arange(8) % 4
    calibration = [(x, labels) for x in pictures()]
    masks = prune(model, method, sparsity=0.5, order=order, calibration=calibration)
    assert masks.achieved_in(model).achieved == pytest.approx(0.5, abs=0.01)


def test_taylor_takes_the_loss_of_the_head():
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**options, image_size=8, patch_size=4, num_channels=1, num_labels=4))
    x, labels = pictures()[0], torch.arange(8) % 4
    sites = find_sites(model, "linear")
    found = squared_gradients(model, sites, [(x, labels)])
    torch.nn.functional.cross_entropy(model(x).logits, labels).backward()
    for site in sites:
        torch.testing.assert_close(found[site.name], model.get_parameter(site.name).grad.square())
    with pytest.raises(InputError, match="have a head with a loss"):
        squared_gradients(model.vit, find_sites(model.vit, "linear"), [(x, labels)])
    with pytest.raises(InputError, match=r"hold \(inputs, labels\)"):
        squared_gradients(model, sites, [x])


def test_taylor_on_texts_with_labels_and_with_an_encoder():
    options = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**options, decoder_start_token_id=0)).eval()
    ids = torch.randint(3, 64, (1, 6))
    sites = find_sites(model, "linear")
    alone, labelled = squared_gradients(model, sites, [ids]), squared_gradients(model, sites, [(ids, ids)])
    model(input_ids=ids, labels=ids).loss.backward()
    for site in sites:
        wanted = model.get_parameter(site.name).grad.square()
        torch.testing.assert_close(alone[site.name], wanted)
        torch.testing.assert_close(labelled[site.name], wanted)


def test_taylor_names_a_site_that_the_loss_does_not_use():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    model.forward = lambda x: model["a"](x)
    with pytest.raises(InputError, match=r"sites must be used by the loss, got b\.weight"):
        prune(model, "taylor", calibration=[(torch.randn(2, 4), torch.tensor([0, 1]))])
