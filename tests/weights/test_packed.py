"""Packed layers in models: the same weights and logits as the dense model with zeros, whatever is done to it."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from paucity.checks import InputError
from paucity.kernels.linear import PackedLinear
from paucity.models.load import Loaded
from paucity.models.packed import packed_linears
from paucity.models.save import save
from paucity.models.sites import find_sites, weight_view
from paucity.ops.formats import PackedBitmask, PackedBlocks, PackedGroups, PackedNM
from paucity.ops.formats.smallest import nm_pattern, smallest
from paucity.ops.select import nm_mask, topk_mask
from paucity.weights import Packing, pack, prune, unpack
from paucity.weights.apply import apply_step, options_for
from paucity.weights.structured import find_units, shrink

IDS = torch.tensor([[5, 9, 3, 40, 22, 7, 1, 60, 33, 2, 11]])


def sparsify(model, kind="nm"):
    for site in find_sites(model, "linear"):
        view = weight_view(model, site)
        if kind == "nm" and view.shape[-1] % 4 == 0:
            view.masked_fill_(~nm_mask(view.float().abs(), n=2, m=4), 0)
        elif kind == "bitmask":
            view.masked_fill_(~topk_mask(view.float().abs().reshape(-1, view.shape[-1]), sparsity=0.7).view_as(view), 0)
        elif kind == "blocks":
            view[..., : view.shape[-2] // 2, :] = 0
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_every_architecture_computes_the_same(tiny_model, architecture):
    model = sparsify(tiny_model(architecture))
    dense = copy.deepcopy(model)
    packing = pack(model)
    assert isinstance(packing, Packing)
    assert set(packing.packed) == set(packed_linears(model))
    assert packing.num_bytes < 0.6 * packing.dense_bytes
    assert set(packing.packed) == {s.module for s in find_sites(dense, "linear") if "expert" not in s.kind}
    for path, layer in packing.packed.items():
        assert torch.equal(layer.weight, dense.get_submodule(path).weight)
        assert layer.format == "nm"
        assert packing.density[path] == pytest.approx(0.5)
    torch.testing.assert_close(logits(model), logits(dense), atol=2e-4, rtol=1e-4)
    with torch.no_grad():  # one token at a time, from a cache
        cache = None
        for i in range(3):
            out = model(IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    torch.testing.assert_close(out.logits[:, -1], logits(dense)[:, 2], atol=2e-4, rtol=1e-4)
    assert unpack(model) == list(packing.packed)
    assert [type(module) for module in model.modules()] == [type(module) for module in dense.modules()]
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize(("kind", "found"), [("nm", "nm"), ("bitmask", "bitmask"), ("blocks", "blocks")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_the_smallest(kind, found, dtype):
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64, bias=False)).to(dtype)
    sparsify(model, kind)
    dense, x = copy.deepcopy(model), torch.randn(3, 64, dtype=dtype)
    packing = pack(model)
    assert {layer.format for layer in packing.packed.values()} == {found}
    assert str(found) in repr(model).lower()
    for again in (model, copy.deepcopy(model), model.to("cpu")):
        torch.testing.assert_close(again(x), dense(x), atol=2e-2 if dtype.itemsize == 2 else 1e-5, rtol=2e-2)
    assert torch.equal(model[0].bias, dense[0].bias)


def test_smallest_counts_bytes():
    weight = torch.randn(64, 128).bfloat16()
    assert nm_pattern(weight) is None
    weight[:, ::8] = 0
    assert nm_pattern(weight) == (7, 8)
    weight[16:] = 0
    stored = smallest(weight)
    assert isinstance(stored, PackedBlocks)
    assert stored.nbytes == min(PackedBlocks.pack(weight, b).nbytes for b in [(4, 16), (8, 16), (16, 16)])
    one_of_16 = (torch.arange(64 * 64) % 16 == 0).view(64, 64) * torch.randn(64, 64)
    assert isinstance(smallest(one_of_16), PackedNM)
    assert isinstance(smallest(torch.eye(64)), PackedBitmask)
    assert nm_pattern(torch.zeros(0, 4)) is None


def test_autograd_state_and_training_of_biases():
    model = sparsify(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8)), "bitmask")
    dense = copy.deepcopy(model)
    pack(model)
    x, y = (torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    model(x).square().sum().backward()
    dense(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model[0].bias.grad, dense[0].bias.grad, atol=1e-4, rtol=1e-4)
    assert {name for name, _ in model.named_parameters()} == {"0.bias", "1.bias"}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert {"0.values", "0.bits", "0.row_offsets"} <= set(state)
    model[0].values.zero_()
    model.load_state_dict(state)
    torch.testing.assert_close(model(x), dense(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    with pytest.raises(InputError, match="x must have the dtype of weight"):
        model(x.bfloat16())
    with pytest.raises(InputError, match=r"x must have shape \[\.\.\., 32\], got \[5, 31\]"):
        model(x[:, :31])


@pytest.mark.parametrize("kind", ["nm", "bitmask", "blocks", "groups"])
def test_compiles_whole(kind):
    torch._dynamo.reset()  # each way of running is a compilation of the same code, of which there may be eight
    zeros = "nm" if kind == "nm" else "blocks"
    model = sparsify(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)), zeros).eval()
    pack(model, kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (1, 20):
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(compiled(x), model(x))


def test_a_dense_weight_beside_reads_prompts():
    model = sparsify(nn.Sequential(nn.Linear(64, 32)))
    dense = copy.deepcopy(model)
    packing = pack(model, keep_dense=True)
    assert packing.num_bytes > packing.dense_bytes
    assert not any("dense" in name for name in model.state_dict())
    x = torch.randn(40, 64)
    assert torch.equal(model(x), dense(x))
    torch.testing.assert_close(model(x[:2]), dense(x[:2]))


def test_hooks_shared_modules_and_groups():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(32, 32)})
    model["c"].weight = nn.Parameter(model["c"].weight.detach())
    sparsify(model)
    seen = []
    handle = shared.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    pack(model)
    assert isinstance(model["a"], PackedLinear)
    assert model["b"][0] is model["a"]
    model["a"](torch.randn(1, 32))
    handle.remove()
    model["a"](torch.randn(1, 32))
    assert seen == [PackedLinear]

    stored = PackedGroups.pack(torch.randn(16, 32) * (torch.rand(16, 2) < 0.5).repeat_interleave(16, 1))
    model = nn.Sequential(nn.Linear(32, 16))
    model[0].weight.data = stored.unpack()
    with pytest.raises(InputError, match=r"weights must be what the model's layers hold, got another weight for 0"):
        pack(model, weights={"0.weight": PackedGroups.pack(torch.randn(16, 32))})
    pack(model, weights={"0.weight": stored})
    assert model[0].codes is stored.codes


def test_left_dense_and_bad_input(tiny_model):
    model = sparsify(tiny_model("llama"))
    model.lm_head.weight.data[:, ::2] = 0
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[0].self_attn.q_proj.weight.data.normal_()
    model.model.layers[0].self_attn.k_proj.forward = lambda x: x
    packing = pack(model)
    assert "lm_head" not in packing.packed
    assert "100% of it is not zero" in packing.left["model.layers.0.self_attn.q_proj"]
    assert packing.left["model.layers.0.self_attn.k_proj"] == "its forward is not its own"
    assert len(packing.packed) == 12
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32), "c": nn.Linear(32, 32)})
    sparsify(model)["b"].weight = model["a"].weight
    assert pack(model).left == {"a": "its weight is tied"}
    dense = tiny_model("llama")
    for arguments, message in (
        ({}, "pack: model must hold linear layers sparse enough to be smaller packed, got none .*100% of it"),
        ({"format": "csr"}, "format must be one of auto, bitmask, blocks, groups, nm, got csr"),
        ({"n": 2, "m": 4}, "n and m must be given together, for the format nm, got n=2, m=4 and auto"),
        ({"format": "nm", "n": 2, "m": 4}, "weight must have at most 2 nonzeros in every 4 columns"),
        ({"sites": ["conv"]}, "kinds must be in the model"),
        ({"weights": {"lm_head.weights": None}}, "weights must be of linear layers that can be packed, got lm_head"),
    ):
        with pytest.raises(InputError, match=message):
            pack(Loaded(dense, None, "llama"), **arguments)
    assert not packed_linears(dense)


def test_the_step_measures_and_goes(tiny_model):
    model = tiny_model("gpt2")
    loaded, before = Loaded(model, None, "tiny"), copy.deepcopy(model)
    with pytest.raises(InputError, match="hold linear layers sparse enough"):
        apply_step(loaded, "packed", options_for("packed")(), [])
    pruned = apply_step(loaded, "magnitude", options_for("magnitude")(n=2, m=4), [])
    zeros = copy.deepcopy(model)
    applied = apply_step(loaded, "packed", options_for("packed")(), [])
    assert applied.density() == pytest.approx(dict.fromkeys(applied.density(), 0.5))
    assert pruned.density() == pytest.approx(applied.density())
    state = applied.state()
    assert state["packed_bytes"] < 0.6 * state["dense_bytes"]
    assert state["notes"][0] == "8 layers are packed, into 53% of their dense bytes."
    torch.testing.assert_close(logits(model), logits(zeros), atol=2e-4, rtol=1e-4)
    applied.reset()
    applied.remove()
    assert isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)
    pruned.remove()
    assert torch.equal(logits(model), logits(before))


def test_shrunk_layers_that_are_saved_larger_stay_dense(tiny_model, tmp_path):
    model = tiny_model("llama")
    neurons = find_units(model, "neurons")
    kept = [(units, torch.arange(48) < size) for units, size in zip(neurons, (48, 32), strict=True)]
    shrink(model, kept)
    prune(model, "magnitude", n=2, m=4)
    packing = pack(model)
    assert any("saved in another shape" in reason for reason in packing.left.values())
    loaded = Loaded(model, None, "test")
    save(loaded, tmp_path / "dense")
    ids = torch.randint(0, 64, (1, 9))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
