"""What is found of a model's rotary embedding, against what the model does to one token at two positions."""

import copy

import pytest
import torch
import transformers
from transformers import AttentionInterface

from paucity.attention.rotary import Rotary, find_rotary

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
FOUND = {
    "llama": {},
    "llama-yarn": {"rope_parameters": YARN},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 16},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neox": {},  # a quarter of the dimensions
    "phi": {},  # half of them
    "phi3": {},
    "stablelm": {},
    "olmo2": {},
    "starcoder2": {},
    "smollm3": {},  # the last layer has no positions
}
REFUSED = {
    "llama-dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    "cohere": {},  # neighbours turn together
    "glm": {"head_dim": 8},
    "helium": {"head_dim": 8},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "opt": {"ffn_dim": 48},
    "exaone4": {"sliding_window": 16},  # some layers without positions, which only its code tells
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8}
    | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_experts_per_tok": 2},
}


def tiny(kind, options):
    config = transformers.AutoConfig.for_model(kind.split("-")[0], **(SIZE | options))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def queries_and_keys(model, position):
    """Of one token alone, so that layers see the same whatever its position."""
    seen = {}

    def record(module, query, key, value, *args, **kwargs):
        seen[module.layer_idx] = query[0, :, 0], key[0, :, 0]
        return value.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(1, 2).contiguous(), None

    AttentionInterface.register("record", record)
    model.set_attn_implementation("record")
    model(input_ids=torch.tensor([[5]]), position_ids=torch.tensor([[position]]), use_cache=False)
    return seen


@pytest.mark.parametrize("kind", FOUND)
def test_turning_is_what_the_model_does(kind):
    model = tiny(kind, FOUND[kind])
    at, there = (queries_and_keys(model, position) for position in (3, 200))
    assert len(at) == 4
    for layer in at:
        rotary = find_rotary(model, layer)
        for old, new in zip(at[layer], there[layer], strict=True):
            turned = rotary.turn(old[:, None], torch.tensor([3]), torch.tensor([200]))[:, 0]
            torch.testing.assert_close(turned, new, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_known_is_not_guessed(kind):
    model = tiny(kind, REFUSED[kind])
    assert [find_rotary(model, layer) for layer in range(4)] == [None] * 4


def test_local_and_global_layers_have_frequencies_of_their_own():
    model = tiny("gemma3_text", FOUND["gemma3_text"])
    local, full = (find_rotary(model, layer).inv_freq for layer in (0, 1))
    assert local.shape == full.shape
    assert not torch.equal(local, full)


def test_two_sets_of_frequencies_are_not_guessed_between():
    model = tiny("llama", {})
    model.model.other = copy.deepcopy(model.model.rotary_emb)
    assert find_rotary(model, 0) is not None
    model.model.other.inv_freq *= 2
    assert find_rotary(model, 0) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_turns_add_up_far_from_the_start(dtype):
    draw = torch.Generator().manual_seed(0)
    rotary = Rotary(10000.0 ** -(torch.arange(4) / 4))
    x, far = torch.randn(2, 3, 5, 12, generator=draw).to(dtype), torch.arange(5) + 100_000
    there = rotary.turn(x, torch.arange(5), far)
    assert there.dtype == dtype
    assert torch.equal(there[..., 8:], x[..., 8:])
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(rotary.turn(there, far, torch.arange(5)), x, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(there.float().norm(dim=-1), x.float().norm(dim=-1), atol=0.03, rtol=1e-2)
