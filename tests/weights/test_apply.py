"""Pruning of whole models."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from paucity.checks import InputError
from paucity.models.applied import Applied
from paucity.models.blocks import sites_by_block
from paucity.models.hooks import input_norms
from paucity.models.load import Loaded
from paucity.models.sites import find_sites, weight_view
from paucity.weights import prune, wanda_mask
from paucity.weights.apply import apply_step, options_for
from paucity.weights.matrices import from_matrices


def wrap(model):
    return Loaded(model, None, "test")


def tokens(count=2, length=12):
    return [torch.randint(0, 64, (1, length)) for _ in range(count)]


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_every_architecture_counts_zeros_and_comes_back(tiny_model, architecture, method):
    model = tiny_model(architecture)
    before = snapshot(model)
    applied = apply_step(wrap(model), method, options_for(method)(sparsity=0.25), tokens())
    assert isinstance(applied, Applied)
    names = {site.name for site in find_sites(model, ("linear",))}
    assert set(applied.density()) == names
    assert applied.masks.sparsity().achieved == pytest.approx(0.25, abs=0.02)
    for name, tensor in model.state_dict().items():
        kept = applied.masks[name] if name in names else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor, before[name].masked_fill(~kept, 0))
    assert applied.density() == pytest.approx(dict.fromkeys(names, 0.75), abs=0.02)
    applied.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_each_site_is_calibrated_in_the_dense_model(tiny_model, architecture):
    model, batches = tiny_model(architecture), [*tokens(), *tokens(1, 7)]
    sites = find_sites(model, ("linear",))
    norms = input_norms(model, sites, batches)
    dense = {site.name: weight_view(model, site).clone() for site in sites}
    masks = prune(wrap(model), "wanda", sparsity=0.5, calibration=batches)
    for site in sites:
        norm = norms[site.name]
        expected = wanda_mask(dense[site.name], norm.where(norm.amax(-1, keepdim=True) > 0, 1), sparsity=0.5)
        same = from_matrices(model, site, expected) == masks[site.name]
        assert same.float().mean() > 0.999, site.name  # sums in another order can break ties


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_the_order_of_blocks_calibrates_a_block_while_none_of_it_is_pruned(tiny_model, kind):
    model, reference, batches = tiny_model(kind), tiny_model(kind), [*tokens(), *tokens(1, 7)]
    reference.load_state_dict(model.state_dict())
    masks = prune(wrap(model), "wanda", order="block", calibration=batches)
    for _, group in sites_by_block(find_sites(reference, ("linear",))):
        norms = input_norms(reference, group, batches)
        for site in group:
            weight, norm = weight_view(reference, site), norms[site.name]
            expected = wanda_mask(weight, norm.where(norm.amax(-1, keepdim=True) > 0, 1), sparsity=0.5)
            same = from_matrices(reference, site, expected) == masks[site.name]
            assert same.float().mean() > 0.999, site.name
            weight.masked_fill_(~expected, 0)


def test_conv1d_rows_are_outputs(tiny_model):
    model = tiny_model("gpt2")
    masks = prune(wrap(model), "wanda", n=1, m=4, calibration=tokens())
    mask = masks["transformer.h.0.attn.c_attn.weight"]
    assert mask.shape == (32, 96)  # stored [in, out]
    assert (mask.view(8, 4, 96).sum(1) == 1).all()


def test_experts_prune_one_by_one_and_unseen_ones_by_magnitude(tiny_model):
    model = tiny_model("mixtral")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    dense = model.get_parameter(name).detach().clone()
    applied = apply_step(wrap(model), "wanda", options_for("wanda")(sparsity=0.5), [torch.tensor([[3]])])
    mask = applied.masks[name]
    assert (mask.sum(-1) == 16).all()
    unseen = next(note for note in applied.state()["notes"] if note.startswith(name))
    assert "2 experts got nothing" in unseen  # one token, two of four experts
    by_magnitude = dense.abs() >= dense.abs().sort(-1, descending=True).values[..., 15:16]
    assert (mask == by_magnitude).flatten(1).all(1).sum() == 2


def test_global_keeps_the_highest_of_all(tiny_model):
    model = tiny_model("llama")
    dense = {site.name: weight_view(model, site).clone() for site in find_sites(model, ("linear",))}
    masks = prune(wrap(model), "magnitude", sparsity=0.7, scope="global")
    every = torch.cat([weight.abs().flatten() for weight in dense.values()])
    kept = torch.cat([masks[name].flatten() for name in dense])
    assert every[kept].min() >= every[~kept].max()
    assert kept.sum() == every.numel() - round(every.numel() * 0.7)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("allocation", ["erk", "owl"])
def test_allocations_meet_the_target_unevenly(tiny_model, method, allocation):
    masks = prune(wrap(tiny_model("llama")), method, sparsity=0.6, allocation=allocation, calibration=tokens())
    report = masks.sparsity()
    assert report.achieved == pytest.approx(0.6, abs=0.02)
    assert max(report.layers.values()) - min(report.layers.values()) > 0.02


def test_any_module_and_convolution():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 4, 8)).eval()
    batches = [torch.randn(3, 4, 4, 4)]
    masks = prune(wrap(model), "wanda", sparsity=0.5, sites=("conv", "linear"), calibration=batches)
    assert (masks["0.weight"].flatten(1).sum(1) == 9).all()
    masks = prune(wrap(model), "magnitude", n=1, m=2, sites=("conv",))
    assert (masks["0.weight"].sum(1) == 1).all()


def test_bad_input_changes_nothing(tiny_model):
    model = tiny_model("llama")
    before = snapshot(model)
    nan = tiny_model("llama")
    nan.load_state_dict(before)
    nan.model.layers[0].mlp.up_proj.weight.data[0] = float("nan")
    cases = [
        (model, "wanda", {}, "calibration must hold at least one batch"),
        (model, "wanda", {"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        (model, "magnitude", {"n": 2, "m": 5}, r"m must divide the input size of model.layers.0.*q_proj.weight \(32\)"),
        (model, "magnitude", {"n": 2}, "n and m must be given together"),
        (model, "magnitude", {"n": 2, "m": 4, "sparsity": 0.6}, r"sparsity must be left out or equal 1 - n/m \(0.5\)"),
        (model, "magnitude", {"allocation": "erk", "scope": "global"}, "allocation must be uniform"),
        (model, "magnitude", {"scope": "rows"}, r"got rows \(did you mean 'row'\?\)"),
        (model, "magnitude", {"sites": ("experts",)}, "kinds must be in the model"),
        (model, "magnitude", {"sites": ("norm",)}, "sites must be weight matrices"),
        (model, "wanda", {"sites": ("embedding",), "calibration": tokens()}, "not hold embeddings"),
        (nan, "wanda", {"calibration": tokens()}, "NaN or infinity at the input of model.layers.0.mlp.down_proj"),
        (model, "wandaa", {}, r"did you mean 'wanda'\?"),
    ]
    for target, score, arguments, message in cases:
        with pytest.raises(InputError, match=message):
            prune(wrap(target), score, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(nan.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight)
    with pytest.raises(ValidationError, match="n and m must be given together"):
        options_for("wanda")(n=2)
