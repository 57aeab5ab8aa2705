"""Linear layers that do not read what is dropped give what zeroing gives, and leave nothing behind."""

import copy

import pytest
import torch
from torch import nn

from paucity.activations import AppliedActivations
from paucity.activations.apply import apply_step, options_for
from paucity.activations.linear import SparseInputLinear
from paucity.kernels import dispatch, native
from paucity.kernels.linear import op
from paucity.models.load import Loaded
from paucity.models.sites import find_sites

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library was not built")


@pytest.fixture(autouse=True)
def _small_weights_count(monkeypatch):
    monkeypatch.delenv("PAUCITY_KERNELS", raising=False)
    monkeypatch.setattr(op, "MIN_WEIGHTS", 1)


def stand_ins(model):
    return [name for name, module in model.named_modules() if isinstance(module, SparseInputLinear)]


@pytest.mark.parametrize("method", ["teal", "wina", "cats"])
@pytest.mark.parametrize("tokens", [1, 5, 24])
def test_reading_less_equals_zeroing(tiny_model, method, tokens):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (1, 24))
    options = options_for(method)(sparsity=0.5, **({} if method == "cats" else {"allocation": "uniform"}))
    applied = apply_step(Loaded(model, None, ""), method, options, [ids])
    assert len(stand_ins(model)) == (2 if method == "cats" else 14)
    assert not applied.state()["notes"]
    applied.reset()
    with dispatch.dense_runs() as ran_dense:
        sparse = model(ids[:, :tokens]).logits
    if tokens in (1, 24):  # in between it depends on how many inputs the tokens keep together
        assert bool(ran_dense) == (tokens > op.MAX_TOKENS)
    density = applied.density()
    copied = copy.deepcopy(model)
    applied.remove()
    assert not stand_ins(model)
    assert all(site_weight.is_contiguous() for site_weight in model.parameters())
    zeroing = AppliedActivations(model, method, applied.settings, skip=False)
    torch.testing.assert_close(sparse, model(ids[:, :tokens]).logits, atol=1e-4, rtol=1e-4)
    assert zeroing.density() == pytest.approx(density, abs=0.02)
    zeroing.remove()
    assert torch.equal(copied(ids[:, :tokens]).logits, sparse)  # a copy is as sparse as the model was
    assert copied.state_dict().keys() == model.state_dict().keys()


def test_hooks_parameters_and_gradients_stay(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (1, 4))
    site = next(site for site in find_sites(model, ("up",)) if site.layer == 0)
    linear, seen = model.get_submodule(site.module), []
    linear.register_forward_hook(lambda module, args, out: seen.append(module))
    options = options_for("wina")(sparsity=0.5, allocation="uniform", sites=("up",))
    applied = apply_step(Loaded(model, None, ""), "wina", options, [ids])
    layer = model.get_submodule(site.module)
    assert layer is not linear
    assert layer.weight is linear.weight
    assert layer.weight.stride(0) == 1
    model(ids).logits.sum().backward()
    assert seen == [layer]
    assert linear.weight.grad.isfinite().all()
    applied.remove()
    assert model.get_submodule(site.module) is linear


def test_other_layers_are_zeroed_and_said(tiny_model):
    model, ids = tiny_model("gpt2"), torch.randint(3, 64, (1, 4))
    options = options_for("wina")(sparsity=0.5, allocation="uniform")
    applied = apply_step(Loaded(model, None, ""), "wina", options, [ids])
    assert not stand_ins(model)
    assert "8 layers multiply the zeros" in applied.state()["notes"][0]
    applied.remove()


def test_autocast_chooses_the_dtype():
    model = nn.Sequential(nn.Linear(16, 8))
    layer = SparseInputLinear.of(model[0], lambda x: x > 0)
    x = torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x.bfloat16())
    torch.testing.assert_close(out.float(), model[0](x.clamp(min=0)), atol=5e-2, rtol=5e-2)
