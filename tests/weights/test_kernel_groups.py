"""Kernel groups, and channels rearranged through a network."""

import pytest
import torch
import transformers
from torch import nn

from paucity.checks import InputError
from paucity.models.load import Loaded
from paucity.models.vision import ConvNet
from paucity.weights.kernel_groups import (
    KernelGroups,
    apply_step,
    kernel_group_mask,
    kernel_group_masks,
    permute_channels,
    rearrange,
)
from paucity.weights.sparse_conv import fold_batchnorm, sparsify_convs
from paucity.weights.structured.channels_groups import channel_groups


@pytest.mark.parametrize("shape", [(8, 6, 1, 1), (8, 5, 3, 3), (8, 1, 3, 3), (4, 6)])
@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_matches_loops(shape, group_size):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = kernel_group_mask(weight, group_size=group_size, sparsity=0.5)
    rows = (
        weight.abs().flatten(1)
        if shape[1] == 1
        else weight.abs().flatten(2).sum(-1)
        if len(shape) > 2
        else weight.abs()
    )
    sums = {
        (start, column): float(rows[start : start + group_size, column].sum())
        for start in range(0, shape[0], group_size)
        for column in range(rows.shape[1])
    }
    kept = sorted(sums, key=lambda at: -sums[at])[: len(sums) - round(len(sums) * 0.5)]
    for (start, column), _ in sums.items():
        rows_of = mask[start : start + group_size]
        block = rows_of.flatten(1)[:, column] if shape[1] == 1 else rows_of[:, column]
        assert bool((block == ((start, column) in kept)).all())


def net():
    torch.manual_seed(0)
    model = ConvNet(num_classes=5, width=4, depth=4, image_size=8).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    return model


def test_any_order_of_channels_computes_the_same():
    model, x = net(), torch.randn(3, 1, 8, 8)
    moved = model
    for group in channel_groups(model, x):
        if not group.locked:
            moved = permute_channels(moved, group, torch.randperm(group.size))
    assert not torch.equal(moved.blocks[1].pointwise.weight, model.blocks[1].pointwise.weight)
    torch.testing.assert_close(moved(x), model(x), rtol=1e-4, atol=1e-5)


def test_rearrangement_finds_hidden_groups_and_keeps_the_function():
    """Rows of a layer that come in pairs of one pattern, shuffled: side by side again they lose nothing."""
    model, x = net(), torch.randn(3, 1, 8, 8)
    weight = model.blocks[1].pointwise.weight
    with torch.no_grad():
        pattern = (torch.rand(len(weight) // 2, weight.shape[1]) < 0.5).repeat_interleave(2, 0)
        weight[~pattern[torch.randperm(len(weight))]] *= 1e-3
    found = rearrange(model, x, group_size=2, sparsity=0.5)
    assert found.kept_after > found.kept_before
    assert found.orders
    torch.testing.assert_close(found.model(x), model(x), rtol=1e-4, atol=1e-5)
    again = rearrange(found.model, x, group_size=2, sparsity=0.5)
    assert again.kept_after >= found.kept_after


def hugging_face(name):
    torch.manual_seed(0)
    if name == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2])
        return transformers.ResNetForImageClassification(config).eval(), torch.randn(2, 3, 32, 32)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    return transformers.LlamaForCausalLM(config).eval(), torch.randint(64, (2, 8))


@pytest.mark.parametrize(("name", "site"), [("resnet", "pointwise"), ("llama", "linear")])
def test_models_whose_output_is_no_tensor(name, site):
    model, x = hugging_face(name)
    found = rearrange(model, x, group_size=4, sparsity=0.5, sites=[site])
    assert found.orders
    assert found.kept_after > found.kept_before
    torch.testing.assert_close(found.model(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)
    before = model(x).logits
    applied = apply_step(Loaded(model, None, name), "kernel_groups", KernelGroups(sites=(site,)), [x])
    assert "rearranged" in applied.state()["notes"][0]
    applied.remove()
    assert torch.equal(model(x).logits, before)


def test_pattern_runs_on_the_sparse_product():
    model, x = net(), torch.randn(2, 1, 8, 8)
    masks = kernel_group_masks(model, group_size=4, sparsity=0.75)
    masks.apply_(model)
    assert masks.sparsity().achieved == pytest.approx(0.75, abs=0.03)
    sparse, choices = sparsify_convs(fold_batchnorm(model))
    assert all(choice.sparse for choice in choices)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-3, atol=1e-3)


def test_bad_input():
    with pytest.raises(InputError, match=r"group_size must divide the output channels \(6\), got 4"):
        kernel_group_mask(torch.ones(6, 2), group_size=4, sparsity=0.5)
    with pytest.raises(InputError, match=r"group_size must divide the output channels of blocks\.0"):
        rearrange(net(), torch.randn(1, 1, 8, 8), group_size=3, sparsity=0.5)
    group = channel_groups(net(), torch.randn(1, 1, 8, 8))[1]
    with pytest.raises(InputError, match="once each"):
        permute_channels(net(), group, torch.zeros(group.size, dtype=torch.int64))
