from collections import Counter

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from paucity.checks import InputError
from paucity.kernels.linear import PackedLinear
from paucity.models.sites import GROUPS, KINDS, Site, find_sites, weight_view
from paucity.ops.formats import PackedNM

SPLIT = ("q", "k", "v", "o")
GATED = (*SPLIT, "gate", "up", "down")
IN_BLOCKS = {  # matrices of the group `linear`, and routers, in two layers
    "llama": Counter(GATED * 2),
    "mistral": Counter(GATED * 2),
    "qwen2": Counter(GATED * 2),
    "qwen3": Counter(GATED * 2),
    "gemma2": Counter(GATED * 2),
    "gemma3": Counter(GATED * 2),
    "mixtral": Counter((*SPLIT, "router", "expert_gate_up", "expert_down") * 2),
    "qwen2_moe": Counter((*GATED, "router", "router", "expert_gate_up", "expert_down") * 2),
    "qwen3_moe": Counter((*SPLIT, *GATED, "router", "expert_gate_up", "expert_down")),
    "gpt2": Counter(("qkv", "o", "up", "down") * 2),
    "gpt_neox": Counter(("qkv", "o", "up", "down") * 2),
    "opt": Counter((*SPLIT, "up", "down") * 2),
    "phi": Counter((*SPLIT, "up", "down") * 2),
    "phi3": Counter(("qkv", "o", "gate_up", "down") * 2),
}
TIED = {"gemma2", "gemma3", "gpt2", "opt"}


def test_every_weight_is_found_once(tiny_model, architecture):
    model = tiny_model(architecture)
    sites = find_sites(model)
    parameters = dict(model.named_parameters())  # each tied one once
    weights = {name for name in parameters if not name.endswith("bias")}
    assert {site.name for site in sites} == weights
    assert len(sites) == len(weights)
    for site in sites:
        assert site.kind in KINDS
        assert site.layer == next((int(part) for part in site.module.split(".") if part.isdigit()), None)
    embedding = next(site for site in sites if site.kind == "embedding")
    assert embedding.tied == (architecture in TIED)
    assert any(site.kind == "lm_head" for site in sites) != embedding.tied
    assert sum(site.tied for site in sites) == embedding.tied


def test_matrices_in_the_blocks(tiny_model, architecture):
    model = tiny_model(architecture)
    inside = {n: p for n, p in model.named_parameters() if p.ndim > 1 and (".layers." in n or ".h." in n)}
    linear, routers = find_sites(model, ["linear"]), [s for s in find_sites(model) if s.kind == "router"]
    assert Counter(site.kind for site in [*linear, *routers]) == IN_BLOCKS[architecture]
    assert sum(model.get_parameter(site.name).numel() for site in [*linear, *routers]) == sum(
        parameter.numel() for parameter in inside.values()
    )
    norms = [site for site in find_sites(model, "norm") if "norm" not in site.name and "ln_" not in site.name]
    assert norms == []


def test_weight_view_computes_the_output(tiny_model, architecture):
    """Every matrix, as [out, in], gives what its module gives."""
    model = tiny_model(architecture)
    for site in find_sites(model, "linear"):
        module, weight = model.get_submodule(site.module), weight_view(model, site)
        if weight.ndim == 3:
            x, experts = torch.randn(5, weight.shape[2]), weight.shape[0]
            first = find_sites(model, "expert_gate_up")
            up = weight_view(model, next(s for s in first if s.module == site.module))
            down = module.down_proj.detach()
            if site.kind == "expert_down":
                continue  # used below with its partner
            for expert in range(experts):
                gate, value = (x @ up[expert].T).chunk(2, dim=-1)
                wanted = (module.act_fn(gate) * value) @ down[expert].T
                routing = torch.full((5, 1), expert)
                assert torch.allclose(module(x, routing, torch.ones(5, 1)), wanted, atol=1e-5)
            continue
        x = torch.randn(3, weight.shape[1])
        bias = 0 if module.bias is None else module.bias
        assert torch.allclose(module(x), x @ weight.T + bias, atol=1e-5), site.name


def test_weight_view_shares_memory(tiny_model):
    model = tiny_model("gpt2")
    site = find_sites(model, ["qkv"])[0]
    weight_view(model, site)[5] = 0
    module = model.get_submodule(site.module)
    assert isinstance(module, Conv1D)
    assert (module.weight[:, 5] == 0).all()
    assert not weight_view(model, site).requires_grad


def test_plain_modules():
    head = nn.Linear(4, 3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.BatchNorm2d(4), nn.Flatten(), head, nn.Embedding(3, 4))
    model[4].weight = head.weight
    assert [(site.name, site.kind, site.layer, site.tied) for site in find_sites(model)] == [
        ("0.weight", "conv", None, False),
        ("1.weight", "norm", None, False),
        ("3.weight", "linear", None, True),
    ]
    assert weight_view(model, find_sites(model, "conv")[0]).shape == (4, 3, 3, 3)
    assert find_sites(nn.Linear(2, 2)) == [Site("weight", "", "linear", None)]
    fc1 = nn.ModuleDict({"fc1": nn.Linear(2, 2), "blocks": nn.ModuleList([nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1)])})
    assert [(s.kind, s.layer) for s in find_sites(fc1)] == [("linear", None), ("conv", 0), ("conv", 1)]


def test_head_before_its_embedding():
    model = nn.ModuleDict({"lm_head": nn.Linear(2, 5, bias=False), "embed": nn.Embedding(5, 2)})
    model["lm_head"].weight = model["embed"].weight
    assert find_sites(model) == [Site("embed.weight", "embed", "embedding", None, tied=True)]


def test_groups_select(tiny_model):
    model = tiny_model("qwen2_moe")
    for group, kinds in GROUPS.items():
        assert find_sites(model, [group]) == [site for site in find_sites(model) if site.kind in kinds]
    assert find_sites(model, ["q", "attention"]) == find_sites(model, "attention")


def test_bad_input(tiny_model):
    model = tiny_model("gpt2")
    message = r"kinds must be in the model \(it has down, embedding, norm, o, position_embedding, qkv, up\), got gate\."
    with pytest.raises(InputError, match=message):
        find_sites(model, ["up", "gate"])
    with pytest.raises(InputError, match=r"kinds must be in the model .*, got experts\."):
        find_sites(model, ["experts"])
    packed = nn.Sequential(PackedLinear(PackedNM.pack(torch.eye(4), 1, 4)))
    with pytest.raises(InputError, match=r"\(it has none; packed layers are none, until paucity\.weights\.unpack"):
        find_sites(packed, "linear")
    with pytest.raises(InputError, match=r"kinds must be one of .*, got attenion \(did you mean 'attention'\?\)"):
        find_sites(model, ["attenion"])
    with pytest.raises(InputError, match=r"weight_view: site must be in the model, got nowhere\.weight\."):
        weight_view(model, Site("nowhere.weight", "nowhere", "linear", None))
