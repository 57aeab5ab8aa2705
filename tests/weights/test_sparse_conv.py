"""Folded BatchNorm and sparse 1x1 convolutions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paucity.checks import InputError
from paucity.measure.flops import flops
from paucity.models.vision import ConvNet, ViT
from paucity.ops.formats import PackedCSR
from paucity.weights.sparse_conv import DepthwiseConv, SparseConv1x1, fold_batchnorm, sparsify_convs


def pruned(sparsity=0.9, **options):
    """A ConvNet with running statistics that are not those it started with, and zeros in its 1x1 convolutions."""
    torch.manual_seed(0)
    model = ConvNet(**({"width": 8, "image_size": 28} | options))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    with torch.no_grad():
        for block in model.blocks:
            weight = block.pointwise.weight
            weight[torch.rand_like(weight) < sparsity] = 0
    return model.eval()


@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (1, 16, 4, 4), (5, 8, 2, 3), (9, 3, 1, 1), (2, 6, 8, 8)])
@pytest.mark.parametrize("stride", [1, 2])
def test_sparse_conv_matches_loops(shape, stride):
    torch.manual_seed(0)
    x, conv = torch.randn(shape), nn.Conv2d(shape[1], 6, 1, stride)
    with torch.no_grad():
        conv.weight[torch.rand_like(conv.weight) < 0.6] = 0
        conv.weight[2] = 0
    out = SparseConv1x1.from_conv(conv)(x)
    for image in range(shape[0]):
        for channel in range(6):
            expected = conv.bias[channel] + sum(
                conv.weight[channel, i, 0, 0] * x[image, i, ::stride, ::stride] for i in range(shape[1])
            )
            torch.testing.assert_close(out[image, channel], expected, rtol=1e-5, atol=1e-5)


def test_saves_loads_and_moves():
    sparse, other = (SparseConv1x1.from_conv(nn.Conv2d(8, 4, 1)) for _ in range(2))
    other.load_state_dict(sparse.state_dict())
    x = torch.randn(1, 8, 3, 3)
    assert torch.equal(sparse(x), other(x))
    half = other.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert "density=1.000" in repr(half)


def test_folding_keeps_outputs_and_zeros():
    model = pruned()
    folded = fold_batchnorm(model)
    x = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    for mine, theirs in zip(folded.blocks, model.blocks, strict=True):
        assert torch.equal(mine.pointwise.weight == 0, theirs.pointwise.weight == 0)
    assert isinstance(model.blocks[0].norm1, nn.BatchNorm2d)  # the model itself is as it was


class Shared(nn.Module):
    """One convolution that feeds a norm and something else, and one that runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.twice, self.norm2 = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        out = self.first(x)
        return self.norm2(self.twice(self.twice(self.norm1(out) + out)))


def test_what_cannot_be_folded_stays():
    model, x = Shared().eval(), torch.randn(2, 2, 3, 3)
    folded = fold_batchnorm(model)
    assert isinstance(folded.norm1, nn.BatchNorm2d)
    assert isinstance(folded.norm2, nn.BatchNorm2d)
    assert torch.equal(folded(x), model(x))


@pytest.mark.parametrize("batch", [1, 5, 33])
@pytest.mark.parametrize("size", [8, 28])
def test_sparse_net_computes_what_the_zero_filled_net_does(batch, size):
    model = pruned(image_size=size)
    sparse, choices = sparsify_convs(fold_batchnorm(model))
    assert all(choice.sparse for choice in choices)
    assert [choice.name for choice in choices] == [f"blocks.{i}.pointwise" for i in range(6)]
    x = torch.randn(batch, 1, size, size)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), model(x), rtol=1e-3, atol=1e-3)
    assert sum(isinstance(module, SparseConv1x1) for module in sparse.modules()) == 6


@pytest.mark.parametrize("kind", [DepthwiseConv, SparseConv1x1])
def test_autocast_runs_a_sparse_net_and_gives_its_dtype(kind):
    sparse, _ = sparsify_convs(fold_batchnorm(pruned()))
    x = torch.randn(2, 1, 28, 28)
    layers = [module for module in sparse.modules() if isinstance(module, kind)]
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    with torch.no_grad():
        expected = sparse(x)
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            out = sparse(x)
    assert seen == [torch.bfloat16] * len(layers)
    torch.testing.assert_close(out.float(), expected, rtol=5e-2, atol=5e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.95])
def test_a_dtype_without_a_kernel_stays_dense(dtype, sparsity):
    model = pruned(sparsity).to(dtype)
    sparse, choices = sparsify_convs(model)
    assert [choice.reason for choice in choices] == [f"no kernel skips zeros in {dtype}"] * 6
    assert not any(isinstance(module, SparseConv1x1 | DepthwiseConv) for module in sparse.modules())


def test_a_single_convolution_is_replaced():
    conv, x = nn.Conv2d(64, 64, 1), torch.randn(1, 64, 4, 4)
    with torch.no_grad():
        conv.weight[torch.rand_like(conv.weight) < 0.95] = 0
        sparse, choices = sparsify_convs(conv)
        torch.testing.assert_close(sparse(x), conv(x), rtol=1e-4, atol=1e-5)
    assert isinstance(sparse, SparseConv1x1)
    assert choices[0].sparse


def test_flops_count_stored_weights():
    model = pruned()
    sparse, choices = sparsify_convs(model)
    x = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        saved = flops(lambda: model(x)) - flops(lambda: sparse(x))
    sizes = [196, 196, 49, 49, 16, 16]
    removed = [
        int((block.pointwise.weight == 0).sum()) * places for block, places in zip(model.blocks, sizes, strict=True)
    ]
    assert saved == 2 * 2 * sum(removed)
    assert all(choice.density < 0.2 for choice in choices)


def test_stays_dense_where_dense_is_faster_and_says_so():
    _, choices = sparsify_convs(pruned(sparsity=0.3))
    assert not any(choice.sparse for choice in choices)
    assert "is above 0.4" in choices[0].reason
    measured, choices = sparsify_convs(pruned(), torch.randn(2, 1, 28, 28), repeats=3)
    for choice in choices:
        assert not choice.sparse or choice.sparse_ms < choice.dense_ms
        assert isinstance(measured.get_submodule(choice.name), SparseConv1x1) == choice.sparse
        assert "measured" in choice.reason or "whole network" in choice.reason
    wide = pruned(sparsity=0.98, width=64)
    x = torch.randn(16, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(sparsify_convs(wide, x, repeats=3)[0](x), wide(x), rtol=1e-3, atol=1e-3)
    _, none = sparsify_convs(ViT(dim=8, heads=2, depth=1))
    assert none == []


def test_bad_input():
    with pytest.raises(InputError, match="be a 1x1 convolution without padding and groups"):
        SparseConv1x1.from_conv(nn.Conv2d(2, 2, 3))
    with pytest.raises(InputError, match="weight must be a PackedCSR, got Tensor"):
        SparseConv1x1(torch.ones(2, 2, 1, 1))
    with pytest.raises(InputError, match="channels"):
        SparseConv1x1(PackedCSR.pack(torch.ones(2, 3)))(torch.ones(1, 4, 2, 2))
    with pytest.raises(InputError, match="weight must be on meta, got cpu"):
        SparseConv1x1(PackedCSR.pack(torch.ones(2, 3)))(torch.ones(1, 3, 2, 2, device="meta"))

    with pytest.raises(InputError, match=r"example must be what the model's forward takes, got shape \[1, 3, 28, 28\]"):
        sparsify_convs(pruned(), torch.randn(1, 3, 28, 28))

    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else F.relu(x)

    with pytest.raises(InputError, match=r"have a forward that torch\.fx can follow"):
        fold_batchnorm(Branches())
