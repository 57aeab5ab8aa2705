"""Adapters on masked models: names, frozen zeros, merging, training under the mask, what was cut."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from paucity.checks import InputError
from paucity.ops.formats import Masks

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
TOKENS = torch.arange(24).view(2, 12)


def llama(**more):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1, **more)).eval()


def mixtral():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **heads)).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.LazyLinear(3)).eval()


def make_masks(model, seed=1, skip=("norm", "ln_")):
    gen = torch.Generator().manual_seed(seed)
    shapes = {n: p.shape for n, p in model.named_parameters() if p.ndim > 1 and not any(part in n for part in skip)}
    return Masks({name: torch.rand(shape, generator=gen) < 0.5 for name, shape in shapes.items()}, nominal=0.5)


def out(model):
    x = TOKENS if any(isinstance(module, nn.Embedding) for module in model.modules()) else torch.ones(2, 1, 5, 5)
    found = model(x)
    return getattr(found, "logits", found)


def train(model, steps=3):
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.05, weight_decay=0.1
    )  # frozen ones are held, with no gradient
    for _ in range(steps):
        optimizer.zero_grad()
        (out(model) - 1).square().mean().backward()
        optimizer.step()
    return optimizer


def lora(**more):
    return peft.LoraConfig(r=2, lora_alpha=6, **{"target_modules": ["q_proj", "down_proj"], **more})


KINDS = {
    "linear": (llama, lora()),
    "embedding": (lambda: llama(tie_word_embeddings=False), lora(target_modules=["embed_tokens", "v_proj"])),
    "dora": (llama, lora(use_dora=True)),
    "rslora": (llama, lora(use_rslora=True, lora_dropout=0.2)),
    "loha": (llama, peft.LoHaConfig(r=2, target_modules=["q_proj"])),
    "ia3": (llama, peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "whole head": (llama, lora(modules_to_save=["lm_head"])),
    "transformers conv1d": (gpt2, lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "experts": (mixtral, lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    "convolution": (convnet, lora(target_modules=["0", "2"])),
}


def adapted(kind):
    make, config = KINDS[kind]
    model = make()
    if kind == "convolution":
        out(model)
    masks = make_masks(model)
    masks.apply_(model)
    torch.manual_seed(3)
    return masks, peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_has_its_zeros_and_nothing_else_is_lost(kind):
    masks, model = adapted(kind)
    assert Masks.from_zeros(model) == masks, "adapters are not looked at, names are those of the plain model"
    before = {place: model.get_parameter(place).clone() for place, p in model.named_parameters() if not p.requires_grad}
    optimizer = train(model)
    assert all(torch.equal(model.get_parameter(place), value) for place, value in before.items()), "frozen"
    if kind == "whole head":  # the trained copy is what counts, and needs the optimizer's hook
        assert set(masks.violations(model)) == {"lm_head.weight"}
        masks.install(optimizer, model)
    assert masks.violations(model) == {}
    dense = copy.deepcopy(model).merge_and_unload()
    multiplies = kind == "ia3"  # it scales what is there: zeros stay
    assert bool(masks.violations(dense)) != multiplies
    merged, cut, layers = (lambda done: (done.model, done.cut, done.layers))(masks.merge_lora_(model))
    assert type(merged) is type(dense)
    assert not any("lora" in name or "base_layer" in name for name, _ in merged.named_parameters())
    assert masks.violations(merged) == {}
    for name, parameter in dense.named_parameters():
        kept = masks[name] if name in masks else torch.ones_like(parameter, dtype=torch.bool)
        torch.testing.assert_close(merged.get_parameter(name), parameter * kept, rtol=1e-5, atol=1e-6)
    assert cut == 0 if multiplies else 0 < cut < 1
    for name, share in layers.items():
        update = dense.get_parameter(name) - before[next(p for p in before if _same(p, name))]
        expected = (update * ~masks[name]).square().sum() / update.square().sum()
        assert share == pytest.approx(float(expected), abs=1e-4)


def _same(path, name):
    from paucity.ops.formats.mask_names import plain_name

    return plain_name(path) == name


@pytest.mark.parametrize(("kind", "dropout"), [("linear", 0.0), ("rslora", 0.2), ("transformers conv1d", 0.0)])
def test_trained_under_the_mask_merging_loses_nothing(kind, dropout):
    masks, model = adapted(kind)
    handle = masks.train_lora(model)
    model.train()
    train(model)
    model.eval()
    trained = out(model).detach()
    twin = copy.deepcopy(model)
    merged = masks.merge_lora_(model)
    torch.testing.assert_close(out(merged.model), trained, rtol=1e-4, atol=1e-5)
    assert masks.violations(merged.model) == {}
    torch.testing.assert_close(out(twin), trained)
    handle.remove()
    torch.testing.assert_close(out(twin), trained, msg="a copy has hooks of its own")
    masks, model = adapted(kind)  # trained freely, merging changes the model
    train(model)
    free = out(model).detach()
    assert (out(masks.merge_lora_(model).model) - free).abs().max() > 1e-2
    masks, model = adapted(kind)
    train(model)
    free = out(model).detach()
    handle = masks.train_lora(model)
    assert not torch.allclose(out(model), free)
    handle.remove()
    torch.testing.assert_close(out(model), free)


def test_gradients_under_the_mask_are_those_of_the_masked_product():
    masks, model = adapted("linear")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    nn.init.normal_(layer.lora_B.default.weight)
    masks.train_lora(model)
    x = torch.randn(5, 16)
    layer(x).square().sum().backward()
    mask, a = masks["model.layers.0.self_attn.q_proj.weight"], layer.lora_A.default.weight.detach().requires_grad_()
    weight = layer.base_layer.weight + mask * (layer.lora_B.default.weight.detach() @ a) * 3
    (x @ weight.T).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.default.weight.grad, a.grad)


def test_adapters_by_name_and_a_compiled_model():
    masks, model = adapted("linear")
    model.add_adapter("other", lora(target_modules=["k_proj"]))
    nn.init.normal_(model.base_model.model.model.layers[0].self_attn.k_proj.lora_B["other"].weight)
    nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)  # the active one
    before = model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight").clone()
    done = masks.merge_lora_(torch.compile(model, backend="eager"), adapters=["other"])
    assert set(done.layers) == {"model.layers.0.self_attn.k_proj.weight"}
    assert torch.equal(done.model.model.layers[0].self_attn.q_proj.weight, before)
    assert masks.violations(done.model) == {}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning")
def test_tied_embedding_stays_one_and_sparse():
    model = llama(tie_word_embeddings=True)
    masks = make_masks(model)
    masks.apply_(model)
    model = peft.get_peft_model(model, lora(target_modules=["embed_tokens"]))
    train(model)
    merged = masks.merge_lora_(model).model
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert masks.violations(merged) == {}


def test_refused_before_any_work():
    masks, model = adapted("linear")
    train(model)
    before = copy.deepcopy(model.state_dict())
    wrong = Masks({"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2).bool()})
    with pytest.raises(InputError, match=r"must have shape \[16, 16\], got \[2, 2\]"):
        wrong.merge_lora_(model)
    with pytest.raises(InputError, match="adapters must be among default, got none"):
        masks.merge_lora_(model, adapters=["none"])
    for call in (masks.merge_lora_, masks.train_lora):
        with pytest.raises(InputError, match="model must be a PeftModel, or wrap one, got Llama"):
            call(llama())
    norm = Masks({"model.norm.weight": torch.ones(16).bool()})
    with pytest.raises(InputError, match="have an adapter on a masked layer"):
        norm.train_lora(model)
    for kind, names in (("dora", "Linear with a variant"), ("experts", "ParamWrapper"), ("convolution", "Conv2d")):
        its, other = adapted(kind)
        with pytest.raises(InputError, match=f"have plain LoRA on linear layers where it is masked, got {names} at"):
            its.train_lora(other)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B.default.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"model must be finite, got NaN or infinity in .*q_proj\.lora_B"):
        masks.merge_lora_(model)
    with torch.no_grad():
        layer.lora_B.default.weight.copy_(
            before["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"]
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.merge_adapter()
    with pytest.raises(InputError, match="not be merged yet"):
        masks.merge_lora_(model)
