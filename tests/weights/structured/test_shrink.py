"""Removing structure: the same logits as with zeros, in memory, in a folder of plain transformers, and with a cache."""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from paucity.checks import InputError
from paucity.models.sites import find_sites
from paucity.weights.structured import find_units, shrink, trim, zero

KINDS = ("heads", "neurons", "expert_neurons")


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def some(units, seed=0):
    """A mask that keeps one group of queries, or a number of neurons that fits every kernel."""
    generator = torch.Generator().manual_seed(seed + units.layer)
    kept = torch.zeros(units.sizes, dtype=torch.bool)
    if units.kind == "heads":
        order = torch.randperm(units.sizes[0], generator=generator)
        kept[order[: max(1, units.sizes[0] // 2)]] = True
        return kept
    for row in kept.view(-1, units.sizes[-1]):
        row[torch.randperm(units.sizes[-1], generator=generator)[: units.sizes[-1] * 3 // 4]] = True
    return kept


def choice(model, kind):
    present = {"heads": "o", "neurons": "down", "expert_neurons": "expert_down"}[kind]
    if present not in {site.kind for site in find_sites(model)}:
        pytest.skip(f"has no {kind}")
    return [(units, some(units)) for units in find_units(model, kind)]


def same_everywhere(small, expected, ids, folder):
    """In memory, saved and loaded by transformers, reloaded from its state dict, and generating from padded rows."""
    assert torch.allclose(logits(small, ids), expected, atol=1e-5)
    small.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    assert torch.allclose(logits(loaded.eval(), ids), expected, atol=1e-5)
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    small.load_state_dict(state)
    assert torch.allclose(logits(small, ids), expected, atol=1e-5)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = small.generate(ids, **options)
    assert torch.equal(cached, small.generate(ids, use_cache=False, **options))
    assert torch.equal(cached, loaded.generate(ids, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_units_leave_the_logits_of_zeros(tiny_model, architecture, kind, tmp_path):
    model, ids = tiny_model(architecture), torch.randint(3, 64, (2, 18))
    dense, before, text = logits(model, ids), dict(model.named_parameters()), model.config.to_dict()
    kept = choice(model, kind)
    zeroed = zero(model, kept)
    expected = logits(model, ids)
    assert (expected - dense).abs().max() > 1e-3
    zeroed.remove()
    assert torch.equal(logits(model, ids), dense)
    shrunk = shrink(model, kept)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in before.values())
    assert shrunk.density == pytest.approx(zeroed.density)
    same_everywhere(model, expected, ids, tmp_path)
    shrunk.remove()
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    saved = dict.fromkeys(("architectures", "dtype"))  # which save_pretrained writes
    assert model.config.to_dict() | saved == text | saved


def test_layers_leave_the_logits_of_zeros(tiny_model, architecture, tmp_path):
    model, ids = tiny_model(architecture), torch.randint(3, 64, (2, 18))
    zeroed = zero(model, layers=[0])
    expected = logits(model, ids)
    zeroed.remove()
    dense = logits(model, ids)
    shrunk = shrink(model, layers=[0])
    assert model.config.num_hidden_layers == 1
    same_everywhere(model, expected, ids, tmp_path)
    shrunk.remove()
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "mixtral"])
def test_experts_go_with_their_rows_of_the_router(tiny_model, name, tmp_path):
    model, ids, keep = tiny_model(name), torch.randint(3, 64, (2, 18)), torch.tensor([True, False, True, True])
    routers = [
        model.get_submodule(site.module) for site in find_sites(model, "router") if site.module.endswith(".gate")
    ]
    units = find_units(model, "experts")

    def without(module, args, output):
        """The router by hand, with the removed expert out of reach."""
        masked = output[0].masked_fill(~keep, -torch.inf)
        prob, index = masked.float().softmax(-1).topk(module.top_k, dim=-1)
        if getattr(module, "norm_topk_prob", True):
            prob = prob / prob.sum(-1, keepdim=True)
        return masked, prob, index

    handles = [router.register_forward_hook(without) for router in routers]
    expected = logits(model, ids)
    for handle in handles:
        handle.remove()
    shrink(model, [(each, keep) for each in units])
    same_everywhere(model, expected, ids, tmp_path)
    with pytest.raises(InputError, match="leave the 2 that every token is routed to, got 1"):
        shrink(model, [(each, torch.tensor([True, False, False])) for each in find_units(model, "experts")])
    with pytest.raises(InputError, match="be removed by shrink"):
        zero(model, [(each, torch.tensor([True, True, False])) for each in find_units(model, "experts")])


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
def test_as_many_queries_of_every_group(tiny_model, name, tmp_path):
    model, ids = tiny_model(name), torch.randint(3, 64, (2, 18))
    kept = [(units, torch.tensor([[True, False], [False, True]])) for units in find_units(model, "heads")]
    zeroed = zero(model, kept)
    expected = logits(model, ids)
    zeroed.remove()
    shrink(model, kept)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 2, 8)
    same_everywhere(model, expected, ids, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sizes_that_no_configuration_can_say_are_filled_up_and_trimmed_again(tiny_model, name, tmp_path):
    model, ids = tiny_model(name), torch.randint(3, 64, (2, 18))
    first, second = find_units(model, "neurons")
    few, more = torch.arange(48) % 3 == 0, torch.arange(48) % 2 == 0
    shrunk = shrink(model, [(first, few), (second, more)])
    assert shrunk.padded
    down = [model.get_parameter(units.output.parameter).shape for units in (first, second)]
    expected = logits(model, ids)
    same_everywhere(model, expected, ids, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert sum(p.numel() for p in loaded.parameters()) > sum(p.numel() for p in model.parameters())
    assert trim(loaded).padded
    assert [loaded.get_parameter(units.output.parameter).shape for units in (first, second)] == down
    assert torch.allclose(logits(loaded, ids), expected, atol=1e-5)


def test_trim_removes_heads_that_every_layer_can_spare(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (2, 18))
    zero(model, choice(model, "heads") + choice(model, "neurons"))
    expected = logits(model, ids)
    trim(model)
    assert (model.config.num_key_value_heads, model.config.num_attention_heads) == (1, 2)
    assert model.config.intermediate_size == 36
    assert torch.allclose(logits(model, ids), expected, atol=1e-5)


def test_bad_input_leaves_the_model_as_it_was(tiny_model):
    model, gpt2 = tiny_model("llama"), tiny_model("gpt2")
    gpt2.transformer.h[0].attn.scaling = 0.123  # nothing that a configuration says
    heads, neurons = find_units(model, "heads"), find_units(model, "neurons")
    none, odd = torch.zeros(2, 2, dtype=torch.bool), torch.tensor([[True, True], [True, False]])
    one, both = torch.tensor([[True, True], [False, False]]), torch.ones(2, 2, dtype=torch.bool)
    cases = [
        (model, [(heads[0], none)], [], "heads of model.layers.0.self_attn must leave at least one, got none"),
        (model, [(heads[0], odd)], [], r"leave equally many queries in every group that stays, got \[2, 1\]"),
        (model, [(heads[0], one), (heads[1], both)], [], "the same number in every layer, got 1 groups of 2, 2 groups"),
        (model, [(neurons[0], torch.ones(47, dtype=torch.bool))], [], r"must have shape \[48\], got \[47\]"),
        (model, [], [2], r"layers must be in \[0, 1\], got 2"),
        (model, [], [0, 1], "leave at least one of 2 layers, got all 2"),
        (gpt2, [], [1], "where transformer.h.0.attn.scaling would change"),
        (nn.Sequential(nn.Linear(2, 2)), [], [], "be a transformers model"),
    ]
    for target, kept, layers, message in cases:
        before = {name: id(p) for name, p in target.named_parameters()}
        with pytest.raises(InputError, match=message):
            shrink(target, kept, layers=layers)
        assert {name: id(p) for name, p in target.named_parameters()} == before
    tied = tiny_model("llama")
    tied.model.layers[0].self_attn.k_proj.weight = tied.model.layers[0].self_attn.v_proj.weight
    with pytest.raises(InputError, match="have projections of their own to be cut, got tied weights"):
        find_units(tied, "heads")
    model.model.layers[0].mlp.up_proj = nn.Sequential(nn.Linear(32, 48))
    with pytest.raises(InputError, match=r"nothing but projections of known names, got up_proj\.0\.weight"):
        find_units(model, "neurons")


@pytest.mark.parametrize(
    ("name", "options", "kind", "refusal"),
    [
        ("BloomConfig", {"n_layer": 2, "n_head": 4}, "neurons", None),  # always four times the hidden size
        ("BloomConfig", {"n_layer": 2, "n_head": 4}, "heads", "be fused as in GPT-2, GPT-NeoX or Phi-3"),
        (
            "StableLmConfig",
            {"qk_layernorm": True},
            "heads",
            "spans all heads, got q_layernorm.norms, a list of modules",
        ),
        ("Olmo2Config", {}, "heads", "hold nothing that spans all heads, got q_norm.weight"),
        ("GptOssConfig", {"num_local_experts": 4, "head_dim": 8}, "heads", "spans all heads, got sinks"),
        ("GptOssConfig", {"num_local_experts": 4, "head_dim": 8}, "expert_neurons", "must stack gates before ups"),
    ],
)
def test_architectures_beyond_the_table_are_filled_up_or_refused(name, options, kind, refusal, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    common = {} if name.startswith("Bloom") else sizes | {"num_key_value_heads": 2}
    config = getattr(transformers, name)(
        vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, **common | options
    )
    if name.startswith("Bloom"):
        config.hidden_size = 32
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(3, 64, (2, 18))
    if refusal:
        with pytest.raises(InputError, match=refusal):
            find_units(model, kind)
        return
    kept = choice(model, kind)
    zeroed = zero(model, kept)
    expected = logits(model, ids)
    zeroed.remove()
    assert shrink(model, kept).padded
    same_everywhere(model, expected, ids, tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DiffLlamaConfig", {"num_key_value_heads": 2}, "which then raises: not enough values to unpack"),
        ("DiffLlamaConfig", {"num_key_value_heads": 2}, "output of .*o_proj changes"),
        (
            "XGLMConfig",
            {"ffn_dim": 48, "attention_heads": 4, "d_model": 32, "num_layers": 2},
            "raises: shape .* invalid",
        ),
    ],
)
def test_attention_that_would_compute_something_else_is_refused(name, options, message):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {} if name.startswith("XGLM") else sizes
    config = getattr(transformers, name)(
        vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes, **options
    )
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(3, 64, (2, 18))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    dense, said = logits(model, ids), model.config.to_dict()
    with pytest.raises(InputError, match=rf"compute the same with its units removed .*got {name[:-6]}.*{message}"):
        shrink(
            model, [(units, mask.T if message.startswith("output") else mask) for units, mask in choice(model, "heads")]
        )
    assert torch.equal(logits(model, ids), dense)
    assert model.config.to_dict() == said


@pytest.mark.parametrize(("name", "first"), [("llama", "neurons"), ("gpt2", "heads")])
def test_nothing_more_goes_while_the_state_dict_is_filled_up(tiny_model, name, first, tmp_path):
    model, ids = tiny_model(name), torch.randint(3, 64, (2, 18))
    kept = choice(model, first)
    kept = kept if first == "heads" else [(kept[0][0], torch.arange(48) < 16), kept[1]]
    assert shrink(model, kept).padded
    expected = logits(model, ids)
    for again in (
        lambda: shrink(model, choice(model, "neurons")),
        lambda: shrink(model, layers=[0]),
        lambda: trim(model),
    ):
        with pytest.raises(InputError, match="model must be saved and loaded anew, as an earlier step fills up"):
            again()
    same_everywhere(model, expected, ids, tmp_path)
    free = tiny_model("llama")
    free.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(40, 32))
    with pytest.raises(InputError, match="have a configuration that can say its sizes"):
        shrink(free)
