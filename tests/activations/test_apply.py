"""Activation sparsity installed on whole models."""

import json

import pytest
import torch

from paucity.activations import AppliedActivations, column_norm, teal_mask, teal_threshold, wina_mask
from paucity.activations.apply import apply_step, options_for
from paucity.checks import InputError
from paucity.models.applied import Applied
from paucity.models.hooks import input_samples
from paucity.models.load import Loaded
from paucity.models.sites import find_sites, weight_view

UNIFORM = {"teal": {"allocation": "uniform"}, "wina": {"allocation": "uniform"}, "cats": {}}


def tokens(count=3, length=24):
    return [torch.randint(3, 64, (1, length)) for _ in range(count)]


def apply(model, method, **options):
    return apply_step(Loaded(model, None, "test"), method, options_for(method)(**options), tokens())


@pytest.mark.parametrize("method", ["teal", "wina"])
def test_every_architecture_is_sparse_counted_and_comes_back(tiny_model, architecture, method):
    model, ids = tiny_model(architecture), tokens()[0]
    dense = model(ids).logits
    applied = apply(model, method, sparsity=0.4, **UNIFORM[method])
    assert isinstance(applied, Applied)
    assert applied.density() == {}
    sparse = model(ids).logits
    sites = {s.name for s in find_sites(model, ("linear",)) if "expert_" not in s.kind}
    assert set(applied.density()) == sites
    # 24 tokens only, and later sites see what earlier ones changed.
    assert applied.density() == pytest.approx(dict.fromkeys(sites, 0.6), abs=0.25 if method == "teal" else 0.02)
    fused = any("expert_" in s.kind for s in find_sites(model, ("linear",)))
    assert any("they are fused" in note for note in applied.state()["notes"]) == fused
    assert f"{len(sites)} layers multiply the zeros" in applied.state()["notes"][-1]  # all too small to gain
    state = json.loads(json.dumps(applied.state()))
    applied.remove()
    assert torch.equal(model(ids).logits, dense)
    again = AppliedActivations.from_state(model, state)
    assert torch.equal(model(ids).logits, sparse)
    assert again.state() == state
    again.remove()


def test_projections_get_masked_inputs(tiny_model):
    model, ids = tiny_model("llama"), tokens()[0]
    site = next(s for s in find_sites(model, ("q",)) if s.layer == 0)
    samples = input_samples(model, [site], [ids], max_tokens=1000)[site.name]
    weight, seen = weight_view(model, site), []
    handle = model.get_submodule(site.module).register_forward_hook(lambda m, args, out: seen.append(out[0]))
    threshold = teal_threshold(samples, sparsity=0.5)
    norm = column_norm(weight)
    cases = {
        "teal": (teal_mask(samples, threshold), 0.5),
        "wina": (wina_mask(samples, norm, sparsity=0.5), 0.5),
    }
    for method, (mask, density) in cases.items():
        applied = apply_step(
            Loaded(model, None, ""), method, options_for(method)(allocation="uniform", sites=("q",)), [ids]
        )
        model(ids)
        torch.testing.assert_close(seen[-1], (samples * mask) @ weight.T)
        assert applied.density()[site.name] == density  # exactly what was asked, on the calibration tokens
        applied.reset()
        assert applied.density() == {}
        applied.remove()
    handle.remove()


@pytest.mark.parametrize("method", ["teal", "wina", "cats"])
def test_left_padding_equals_singles(tiny_model, method):
    model = tiny_model("llama")
    applied = apply(model, method, **UNIFORM[method])
    long, short = torch.randint(3, 64, (1, 12)), torch.randint(3, 64, (1, 7))
    batch = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.int64), short], 1)])
    attended = torch.ones_like(batch)
    attended[1, :5] = 0
    positions = (attended.cumsum(-1) - 1).clamp_min(0)
    applied.reset()
    together = model(batch, attention_mask=attended, position_ids=positions).logits
    gate = next(iter(applied._gates.values()))
    assert gate.total % batch.numel() == 0  # every token is counted, padding too
    torch.testing.assert_close(together[0], model(long).logits[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[1, 5:], model(short).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture_", ["llama", "gemma2", "phi3", "qwen2_moe"])
def test_cats_closes_neurons(tiny_model, architecture_):
    model, ids = tiny_model(architecture_), tokens(1)
    dense, seen = model(ids[0]).logits, []
    down = next(s for s in find_sites(model, ("down",)) if s.layer == 0)
    applied = apply_step(Loaded(model, None, ""), "cats", options_for("cats")(sparsity=0.5), ids)
    handle = model.get_submodule(down.module).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(ids[0])
    handle.remove()
    assert (seen[0] == 0).float().mean() == pytest.approx(0.5, abs=1e-6)  # the first MLP sees the calibrated input
    density = applied.density()
    assert density[down.name] == pytest.approx(0.5, abs=1e-6)
    for site in find_sites(model, ("mlp",)):
        if site.layer == 0:
            assert density[site.name] == pytest.approx({"gate": 1, "gate_up": 0.75}.get(site.kind, 0.5), abs=1e-6)
    again = AppliedActivations.from_state(model, applied.state())
    again.remove()
    applied.remove()
    assert torch.equal(model(ids[0]).logits, dense)


@pytest.mark.parametrize("method", ["teal", "wina"])
def test_greedy_meets_the_target_with_less_error(tiny_model, method):
    model, batches = tiny_model("llama"), tokens(1, 16)
    sizes = {s.name: weight_view(model, s).numel() for s in find_sites(model, ("linear",)) if s.layer == 0}
    dense = model.model(batches[0]).last_hidden_state
    errors = {}
    for allocation in ("uniform", "greedy"):
        options = options_for(method)(sparsity=0.4, allocation=allocation, step=0.3)
        applied = apply_step(Loaded(model, None, ""), method, options, batches)
        found = applied.state()["sites"]
        mean = sum(found[name]["sparsity"] * size for name, size in sizes.items()) / sum(sizes.values())
        assert mean == pytest.approx(0.4)
        errors[allocation] = (model.model(batches[0]).last_hidden_state - dense).norm()
        applied.remove()
    assert errors["greedy"] < errors["uniform"]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.model.layers.modules())


def test_gradients_pass_through_what_is_kept(tiny_model):
    model = tiny_model("llama")
    applied = apply(model, "wina", allocation="uniform")
    model(tokens()[0]).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()
    applied.remove()


def test_bad_input(tiny_model):
    llama, gpt2, mixtral = tiny_model("llama"), tiny_model("gpt2"), tiny_model("mixtral")
    nan = tiny_model("llama")
    nan.model.layers[1].input_layernorm.weight.data[0] = float("nan")
    cases = [
        (gpt2, "cats", {}, r"model must have gated MLPs \(sites gate or gate_up\) for cats, got only down"),
        (mixtral, "cats", {}, "got only embedding, expert_down"),
        (mixtral, "teal", {"sites": ("experts",)}, "sites must be matrices that a module of their own applies"),
        (mixtral, "wina", {"sites": ("mlp",)}, "kinds must be in the model"),
        (llama, "teal", {"sites": ("norm",)}, "got model.layers.0.input_layernorm.weight"),
        (nan, "teal", UNIFORM["teal"], "calibration of model.layers.1.self_attn.q_proj.weight failed: .* be finite"),
    ]
    for model, method, options, message in cases:
        with pytest.raises(InputError, match=message):
            apply(model, method, **options)
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    for method in ("teal", "cats"):
        with pytest.raises(InputError, match="calibration must hold at least one batch"):
            apply_step(Loaded(llama, None, ""), method, options_for(method)(), [])
    with pytest.raises(InputError, match=r"did you mean 'wina'\?"):
        options_for("wna")
    with pytest.raises(InputError, match="settings must name sites of the model"):
        AppliedActivations.from_state(gpt2, apply(llama, "wina", allocation="uniform").state())


def test_both_methods_take_both_selectors(tiny_model):
    model = tiny_model("llama")
    ids = tokens(1, 40)[0]
    site = next(s for s in find_sites(model, ("down",)) if s.layer == 0)
    inputs = input_samples(model, [site], [ids], max_tokens=1000)[site.name]
    norm = column_norm(weight_view(model, site))
    scores = {"teal": inputs.abs(), "wina": inputs.abs() * norm}
    for method, score in scores.items():
        options = options_for(method)(sparsity=0.5, allocation="uniform", selector="topk", sites=("down",))
        applied = apply_step(Loaded(model, None, "test"), method, options, [])
        model(ids)
        assert applied.density()[site.name] == 0.5
        applied.remove()
        options = options_for(method)(sparsity=0.5, allocation="uniform", selector="threshold", sites=("down",))
        applied = apply_step(Loaded(model, None, "test"), method, options, [ids])
        wanted = score.flatten().kthvalue(score.numel() // 2).values
        assert applied.settings[site.name].threshold == pytest.approx(wanted.item(), rel=1e-5)
        model(ids)
        assert applied.density()[site.name] == pytest.approx(0.5, abs=1 / score.numel())
        applied.remove()
