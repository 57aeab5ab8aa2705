"""The ConvNet and the vision transformer."""

import pytest
import torch
from torch import fx, nn

from paucity.checks import InputError
from paucity.models.load import Loaded
from paucity.models.save import save
from paucity.models.sites import find_sites
from paucity.models.vision import BUILDERS, ConvNet, ViT, description, load_classifier
from paucity.weights.structured.channels import ChannelsOptions, apply_step


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
def test_shapes_config_and_seed(name, channels, size):
    options = {"num_classes": 7, "in_channels": channels, "image_size": size}
    torch.manual_seed(0)
    model = BUILDERS[name](**options).eval()
    torch.manual_seed(0)
    again = BUILDERS[name](**model.config()).eval()
    x = torch.randn(2, channels, size, size)
    assert model(x).shape == (2, 7)
    assert torch.equal(model(x), again(x))
    assert model.config().items() >= options.items()
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("depth", [3, 4, 6, 9])
def test_convnet_stages(depth):
    model = ConvNet(width=4, depth=depth)
    channels = [block.pointwise.out_channels for block in model.blocks]
    assert sorted(set(channels)) == [8, 16, 32]
    assert channels == sorted(channels)
    assert [block.depthwise.stride[0] for block in model.blocks].count(2) == 2
    assert sum(block.residual for block in model.blocks) == depth - 3


def test_convnet_is_mostly_1x1():
    model = ConvNet(width=32)
    pointwise = sum(b.pointwise.weight.numel() for b in model.blocks)
    assert pointwise > 0.9 * sum(p.numel() for p in model.parameters())


def test_vit_is_pre_norm_attention():
    """One block by loops over heads and tokens."""
    torch.manual_seed(0)
    block = ViT(dim=8, heads=2, depth=1).blocks[0].eval()
    x = torch.randn(1, 5, 8)
    normed = block.norm1(x)
    q, k, v = (getattr(block.attn, f"{name}_proj")(normed)[0] for name in "qkv")
    mixed = torch.zeros(5, 8)
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        for token in range(5):
            weights = torch.stack([q[token, own] @ k[other, own] / 2 for other in range(5)]).softmax(0)
            mixed[token, own] = sum(weights[other] * v[other, own] for other in range(5))
    middle = x + block.attn.o_proj(mixed)
    expected = middle + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(middle))))
    torch.testing.assert_close(block(x), expected)


def test_sites_have_layers():
    sites = find_sites(ConvNet(width=4))
    assert {site.layer for site in sites if site.kind == "conv"} == {None, *range(6)}
    kinds = {site.kind for site in find_sites(ViT(dim=8, heads=2, depth=2)) if site.layer == 1}
    assert kinds >= {"q", "k", "v", "o", "up", "down"}


@pytest.mark.parametrize("name", BUILDERS)
def test_what_was_saved_loads_with_removed_channels_too(tmp_path, name):
    model = BUILDERS[name](image_size=8).eval()
    dense = sum(p.numel() for p in model.parameters())
    loaded, x = Loaded(model, None, name), torch.randn(2, 1, 8, 8)
    save(loaded, tmp_path / "dense", extra=description(model))
    assert torch.equal(load_classifier(tmp_path / "dense")(x), model(x))
    apply_step(loaded, "channels", ChannelsOptions(), [x])
    save(loaded, tmp_path / "small", extra=description(model))
    again = load_classifier(tmp_path / "small")
    assert torch.equal(again(x), model(x))
    assert sum(p.numel() for p in again.parameters()) < dense


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="ConvNet: depth must be at least 3, got 2"):
        ConvNet(depth=2)
    with pytest.raises(InputError, match=r"patch_size must divide the side of a picture \(28\), got 5"):
        ViT(patch_size=5)
    with pytest.raises(InputError, match=r"heads must divide dim \(64\), got 5"):
        ViT(heads=5)
    model = ConvNet(width=4)
    save(Loaded(model, None, ""), tmp_path / "wider", extra=description(ConvNet(width=2)))
    save(Loaded(model, None, ""), tmp_path / "deeper", extra=description(ConvNet(width=4, depth=7)))
    for folder in ("wider", "deeper", "nowhere"):
        with pytest.raises(InputError, match="folder must hold a convnet or vit that paucity saved"):
            load_classifier(tmp_path / folder)
