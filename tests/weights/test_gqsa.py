"""Groups pruned, quantised and trained: against loops, exact storage, what each stage may and does change."""

import pytest
import torch
from torch import nn

from paucity.checks import InputError
from paucity.models.applied import Applied
from paucity.models.load import Loaded
from paucity.models.sites import find_sites, weight_view
from paucity.ops.formats import PackedGroups
from paucity.weights import pack
from paucity.weights.apply import apply_step, options_for
from paucity.weights.gqsa import GqsaOptions, gqsa, gqsa_mask, gqsa_saliency
from paucity.weights.gqsa_tuning import GroupWeight

ONE_SHOT = {"block_epochs": 0, "e2e_steps": 0}
TRAINED = {"block_epochs": 4, "weight_lr": 3e-3, "scale_lr": 1e-3, "e2e_steps": 12, "e2e_lr": 1e-3, "batch_size": 2}


def tokens(count=4, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (1, length), generator=generator) for _ in range(count)]


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def naive(weight, saliency, size, sparsity, bits):
    """Pruning by rows and rounding to the nearest, by loops."""
    rows, cols = weight.shape
    out, top = torch.zeros_like(weight), 2**bits - 1
    for row in range(rows):
        sums = [float(saliency[row, start : start + size].double().sum()) for start in range(0, cols, size)]
        order = sorted(range(len(sums)), key=lambda group: -sums[group])
        for group in order[: len(sums) - round(len(sums) * sparsity)]:
            part = weight[row, group * size : (group + 1) * size]
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            scale = torch.tensor((high - low) / top, dtype=torch.float32)
            zero = round(-low / float(scale))
            for i in range(size):
                number = min(max(round(float(part[i] / scale) + zero), 0), top)
                out[row, group * size + i] = (number - zero) * scale
    return out


@pytest.mark.parametrize(("size", "sparsity", "bits"), [(16, 0.5, 4), (8, 0.25, 3), (16, 0.0, 2)])
def test_one_shot_matches_loops(size, sparsity, bits):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 6, bias=False))
    weight, inputs = model[0].weight.detach().clone(), torch.randn(50, 32)
    options = GqsaOptions(sparsity=sparsity, group_size=size, bits=bits, **ONE_SHOT)
    applied = gqsa(model, [inputs], options)
    gram = inputs.double().T @ inputs.double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    saliency = (weight.double() / torch.linalg.inv(damped).diagonal()) ** 2
    torch.testing.assert_close(gqsa_saliency(weight, gram.float()).double(), saliency, rtol=1e-4, atol=0)
    torch.testing.assert_close(model[0].weight.detach(), naive(weight, saliency, size, sparsity, bits))
    assert applied.density() == {"0.weight": pytest.approx(1 - sparsity)}


def test_groups_compete_in_a_row_or_in_a_layer():
    saliency = torch.tensor([[1.0, 1, 2, 2], [3, 3, 9, 9]])
    row = gqsa_mask(saliency, group_size=2, sparsity=0.5)
    assert row.tolist() == [[False, True], [False, True]]
    assert gqsa_mask(saliency, group_size=2, sparsity=0.5, scope="layer").tolist() == [[False, False], [True, True]]


def test_every_architecture_is_stored_exactly_and_comes_back(tiny_model, architecture):
    model = tiny_model(architecture).bfloat16()
    before = snapshot(model)
    options = options_for("gqsa")(group_size=8, block_epochs=1, e2e_steps=1)
    applied = apply_step(Loaded(model, None, "test"), "gqsa", options, tokens(2, 8))
    assert isinstance(applied, Applied)
    sites = find_sites(model, ("linear",))
    assert set(applied.density()) == set(applied.groups) == {site.name for site in sites}
    assert applied.state()["sparsity"] == pytest.approx(0.5, abs=0.02)
    for site in sites:
        packed = applied.groups[site.name]
        again = PackedGroups.from_tensors(packed.tensors())
        assert torch.equal(again.unpack(), weight_view(model, site).flatten(0, -2)), site.name
        assert (packed.mask().sum(-1) == packed.mask().sum(-1)[0]).all()
    others = set(before) - {site.name for site in sites}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in others)
    applied.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_model_runs_on_what_is_stored(tiny_model):
    model, batch = tiny_model("llama"), tokens(1)[0]
    applied = gqsa(model, tokens(2), GqsaOptions(group_size=16, **ONE_SHOT))
    expected = model(batch).logits
    packing = pack(model, "groups", weights=applied.packed())
    for path, layer in packing.packed.items():
        assert torch.equal(layer.packed.codes, applied.groups[f"{path}.weight"].codes)
    torch.testing.assert_close(model(batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_stage_1_lowers_the_error_of_every_block_and_stage_2_the_loss_without_the_numbers(tiny_model):
    calibration, steps = tokens(), []
    runs = {}
    for name, changes in {"one shot": ONE_SHOT, "stage 1": {"e2e_steps": 0}, "both": {}}.items():
        torch.manual_seed(0)
        options = GqsaOptions(group_size=8, **(TRAINED | changes))
        runs[name] = gqsa(tiny_model("llama"), calibration, options, on_progress=lambda *at: steps.append(at))
    state = runs["both"].state()
    assert all(after < 0.9 * before for before, after in state["blocks"].values())
    assert runs["stage 1"].state()["blocks"] == state["blocks"]
    before, after = state["loss"]
    assert after < before
    assert runs["one shot"].state()["loss"] is None
    for name, packed in runs["both"].groups.items():
        frozen = runs["stage 1"].groups[name]
        for part in ("codes", "zeros", "columns", "row_offsets"):
            assert torch.equal(getattr(packed, part), getattr(frozen, part)), name
        assert not torch.equal(packed.scales, frozen.scales)
        if ".0." in name:  # later blocks read what the earlier ones became
            assert torch.equal(packed.mask(), runs["one shot"].groups[name].mask())
    assert steps[-1] == (2 * (1 + 8 + 12), 2 * (1 + 8 + 12))
    with torch.no_grad():
        model = runs["both"].model
        measured = sum(float(model(batch, labels=batch).loss) for batch in calibration) / len(calibration)
    assert measured == pytest.approx(after, rel=1e-4)


def test_blocks_that_do_not_feed_each_other_are_trained_too():
    model = nn.Sequential(nn.Conv2d(8, 16, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 16))
    options = GqsaOptions(group_size=8, sites=("conv", "linear"), **(TRAINED | {"e2e_steps": 0}))
    applied = gqsa(model, [torch.randn(6, 8, 4, 4) for _ in range(4)], options)
    assert applied.density() == {"0.weight": 0.5, "3.weight": 0.5}
    assert all(after < before for before, after in applied.state()["blocks"].values())
    assert set(applied.packed()) == {"3.weight"}
    assert torch.equal(applied.groups["0.weight"].unpack(), model[0].weight.permute(0, 2, 3, 1).flatten(1))


def test_a_training_that_does_harm_is_undone(tiny_model):
    options = GqsaOptions(group_size=8, **(TRAINED | {"weight_lr": 1e4, "scale_lr": 1e4, "e2e_lr": 1e4}))
    state = gqsa(tiny_model("llama"), tokens(), options).state()
    assert all(before == after for before, after in (*state["blocks"].values(), state["loss"]))


def test_zeros_stay_zero_in_training():
    matrix = torch.randn(4, 32) * (torch.arange(32) % 4 < 2)
    weight = GroupWeight(matrix, torch.ones(4, 2, dtype=torch.bool), 4)
    optimizer, target = torch.optim.Adam(weight.parameters(), lr=0.1), torch.randn(4, 32)
    for _ in range(5):
        optimizer.zero_grad()
        (weight.dense() - target).square().sum().backward()
        optimizer.step()
    trained = weight.dense().detach()
    weight.freeze()
    assert torch.equal(weight.packed().unpack(), trained)
    assert not trained[matrix == 0].any()
    assert (trained != matrix)[matrix != 0].any()


def test_bad_input_leaves_the_model(tiny_model):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(InputError, match=r"group_size must divide the inputs of .*q_proj.weight \(32\), got 10"):
        gqsa(model, tokens(), GqsaOptions(group_size=10))
    with pytest.raises(InputError, match="calibration must hold at least one batch of tokens, got none"):
        gqsa(model, [])
    with pytest.raises(InputError, match="token ids from 0 to 63, got 64"):
        gqsa(model, [torch.tensor([[64, 1]])])
    with pytest.raises(InputError, match="at least 2 tokens"):
        gqsa(model, [torch.tensor([[1]])])
    with pytest.raises(InputError, match="e2e_steps must be 0 for a model that is no language model, got 64"):
        gqsa(nn.Sequential(nn.Linear(16, 2)), [torch.randn(3, 16)])
    with pytest.raises(InputError, match=r"gram must have shape \[4, 4\]"):
        gqsa_saliency(torch.ones(2, 4), torch.eye(3))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"finite activations, got NaN or infinity at the input of .*layers\.1"):
        gqsa(model, tokens(), GqsaOptions(group_size=8, **ONE_SHOT))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.copy_(before["model.layers.1.input_layernorm.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("inf")
    with pytest.raises(InputError, match=r"finite weights, got NaN or infinity in .*up_proj"):
        gqsa(model, tokens())


@pytest.mark.parametrize("options", [ONE_SHOT, TRAINED])
def test_what_is_not_finite_behind_the_last_site_is_refused_at_once(tiny_model, options):
    for architecture, name, found in (
        ("gpt2", "transformer.h.1.mlp.c_proj.bias", r"output of transformer\.h\.1"),
        ("llama", "model.norm.weight", "loss of the model"),
    ):
        model, steps = tiny_model(architecture), []
        with torch.no_grad():
            model.get_parameter(name)[0] = float("nan")
        before = snapshot(model)
        given = GqsaOptions(group_size=8, **options | ({"e2e_steps": 1} if architecture == "llama" else {}))
        with pytest.raises(InputError, match=f"finite activations, got NaN or infinity in the {found}"):
            gqsa(model, tokens(), given, on_progress=lambda done, _, steps=steps: steps.append(done))
        assert len(steps) <= 2 * (1 + 2 * options["block_epochs"])
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


def test_small_weights_in_float16_are_rounded_as_they_are_packed():
    matrix = (7.8e-5 * torch.randn(8, 64)).half()
    weight = GroupWeight(matrix, torch.ones(8, 4, dtype=torch.bool), 4)
    weight.freeze()
    assert torch.equal(weight.packed().unpack(), PackedGroups.pack(matrix).unpack())
