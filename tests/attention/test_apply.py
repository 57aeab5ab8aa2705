"""Properties that every prefill policy has on every kind of model: one row per method, one per model."""

import copy
import json

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from paucity.attention import PerHead
from paucity.attention.apply import apply, apply_step, remove
from paucity.attention.portable import options_for
from paucity.attention.site import ATTRIBUTE
from paucity.checks import InputError
from paucity.models.applied import Applied
from paucity.models.load import Loaded

from .table import METHODS, ROWS, policy

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZE),
    "gemma2": lambda: Gemma2Config(**SIZE, sliding_window=12, attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZE, sliding_window=12, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
    "mistral": lambda: MistralConfig(**SIZE, sliding_window=12),
    "gpt2": lambda: GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=None, attn_implementation="eager"
    ),
    "qwen3": lambda: Qwen3Config(**SIZE),
}


def model_of(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=dtype).eval()
    with torch.no_grad():  # sharper attention than at initialisation, so that what is left out matters
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(6.0)
    return model


def tokens(length, batch=1, seed=0):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


methods = pytest.mark.parametrize("method", METHODS)
kinds = pytest.mark.parametrize("kind", sorted(CONFIGS))


def test_tables_have_every_method():
    assert list(ROWS) == METHODS


@kinds
@methods
@pytest.mark.parametrize("length", [2, 63])
def test_full_budget_is_eager_and_removal_is_exact(kind, method, length):
    model, ids = model_of(kind), tokens(length, 2)
    dense = logits(model, ids)
    applied = apply(model, policy(method, "full"))
    assert isinstance(applied, Applied)
    torch.testing.assert_close(logits(model, ids), dense, atol=1e-5, rtol=1e-5)
    assert set(applied.density().values()) == {1.0}
    assert applied.state()["dense_prompts"] == {}
    applied.remove()
    assert torch.equal(logits(model, ids), dense)
    assert model.config._attn_implementation == "eager"


@kinds
@methods
def test_padding_and_batch_do_not_matter(kind, method):
    model, long, short = model_of(kind), tokens(40), tokens(29, seed=1)
    dense = logits(model, long)
    applied = apply(model, policy(method, "sparse"))
    alone = [logits(model, ids) for ids in (long, short)]
    single = applied.density()
    if not ROWS[method].exact:
        assert (alone[0] - dense).abs().max() > 1e-2
        assert all(value < 0.95 for value in single.values())
    batch = torch.cat([long, torch.nn.functional.pad(short, (11, 0))])
    mask = torch.arange(40) >= torch.tensor([[0], [11]])
    position = (mask.long().cumsum(-1) - 1).clamp(min=0)
    applied.reset()
    together = logits(model, batch, attention_mask=mask.long(), position_ids=position)
    assert together.isfinite().all()
    torch.testing.assert_close(together[:1], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1:, 11:], alone[1], atol=1e-5, rtol=1e-5)
    assert applied.density() == pytest.approx(single)


@kinds
@methods
def test_generates_with_a_cache_and_in_chunks(kind, method):
    model, ids = model_of(kind), tokens(40)
    apply(model, policy(method, "sparse", min_length=4))
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 44)
    whole = logits(model, ids)
    cache, parts = DynamicCache(config=model.config), []
    for part in ids.split((14, 3, 23), dim=1):
        parts.append(logits(model, part, past_key_values=cache))
    if ROWS[method].policy(method, "sparse").lookahead(40) == 1:  # others choose by the queries of the chunk
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
    assert torch.cat(parts, dim=1).isfinite().all()


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "mistral", "llama"])
def test_decode_steps_and_unruled_layers_are_dense(kind):
    model, ids = model_of(kind), tokens(40, 2)
    mask = torch.arange(40) >= torch.tensor([[0], [7]])
    options = {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
    dense = logits(model, ids, **options)
    applied = apply(model, policy("sink_window", "sparse"), layers=[])
    torch.testing.assert_close(logits(model, ids, **options)[mask], dense[mask], atol=1e-5, rtol=1e-5)
    assert set(applied.density().values()) == {1.0}
    cache, steps = DynamicCache(config=model.config), []
    for step in range(40):
        part = {"attention_mask": options["attention_mask"][:, : step + 1]}
        part["position_ids"] = options["position_ids"][:, step : step + 1]
        steps.append(logits(model, ids[:, step : step + 1], past_key_values=cache, **part))
    torch.testing.assert_close(torch.cat(steps, dim=1)[mask], dense[mask], atol=1e-4, rtol=1e-4)


@methods
def test_grouped_heads_equal_repeated_heads(method):
    grouped = model_of("llama")
    wide = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZE, "num_key_value_heads": 4})).eval()
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    wide.load_state_dict(weights)
    applied = [apply(model, policy(method, "sparse")) for model in (grouped, wide)]
    torch.testing.assert_close(logits(grouped, tokens(40)), logits(wide, tokens(40)), atol=1e-5, rtol=1e-5)
    assert torch.equal(applied[0].head_density(), applied[1].head_density())


@methods
def test_bfloat16_and_one_token(method):
    model = model_of("llama", torch.bfloat16)
    apply(model, policy(method, "sparse"))
    assert logits(model, tokens(40)).isfinite().all()
    assert logits(model, tokens(1)).shape == (1, 1, 97)


@methods
def test_options_travel_as_json(method):
    made = policy(method, "sparse", layers=[1])
    assert options_for(method).model_validate_json(made.model_dump_json()) == made
    model = model_of("llama")
    state = apply_step(Loaded(model=model, tokenizer=None, source="test"), method, made, []).state()
    assert state["method"] == method
    assert options_for(method)(**json.loads(json.dumps(state))["options"]) == made


def test_short_prompts_are_dense_and_said_so():
    model, ids = model_of("gemma2"), tokens(40)
    dense = logits(model, ids)
    applied = apply(model, policy("sink_window", "sparse", min_length=41, layers=[0]))
    torch.testing.assert_close(logits(model, ids), dense, atol=1e-5, rtol=1e-5)
    assert applied.state()["dense_prompts"] == {"prompt shorter than min_length": 1}
    assert applied.density() == {"layers.0.attention": 1.0, "layers.1.attention": 1.0}
    own = torch.ones(40, 40).tril().bool()[None, None]
    applied.reset()
    logits(model, ids, attention_mask=own)
    assert applied.state()["dense_prompts"] == {"mask of another kind": 2}
    assert applied.density() == {}


def test_what_is_not_finite_is_dense_and_said_so():
    model, ids = model_of("llama"), tokens(40)
    applied = apply(model, policy("sink_window", "sparse"))
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    ids[0, 20] = 5
    found = model.model(ids).last_hidden_state
    assert applied.state()["dense_prompts"] == {"values that are not finite": 2}
    assert found[:, 20:].isnan().all()


def test_padding_inside_a_text_is_dense_and_right_padding_is_not():
    model, ids = model_of("llama"), tokens(40, 2)
    dense_holes = torch.ones(2, 40, dtype=torch.long)
    dense_holes[1, 10:15] = 0
    right = torch.ones(2, 40, dtype=torch.long)
    right[1, 29:] = 0
    dense = logits(model, ids, attention_mask=dense_holes)
    applied = apply(model, policy("vertical_slash", "sparse"))
    alone = logits(model, ids[1:, :29])
    found = logits(model, ids, attention_mask=right)
    torch.testing.assert_close(found[1:, :29], alone, atol=1e-5, rtol=1e-5)
    assert applied.state()["dense_prompts"] == {}
    found = logits(model, ids, attention_mask=dense_holes)
    torch.testing.assert_close(found[dense_holes.bool()], dense[dense_holes.bool()], atol=1e-5, rtol=1e-5)
    assert applied.state()["dense_prompts"] == {"padding inside the text": 2}


def test_short_rows_of_a_long_batch_are_dense():
    model, ids = model_of("llama"), tokens(40, 2)
    mask = torch.arange(40) >= torch.tensor([[0], [20]])
    dense = logits(model, ids, attention_mask=mask.long())
    applied = apply(model, policy("sink_window", "sparse", min_length=30))
    found = logits(model, ids, attention_mask=mask.long())
    torch.testing.assert_close(found[1, 20:], dense[1, 20:], atol=1e-5, rtol=1e-5)
    assert (found[0] - dense[0]).abs().max() > 1e-2
    assert applied.state()["dense_prompts"] == {"prompt shorter than min_length": 2}


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_packed_texts_stay_apart(kind):
    model, ids = model_of(kind), tokens(40)
    position = torch.cat([torch.arange(25), torch.arange(15)])[None]
    dense = logits(model, ids, position_ids=position, use_cache=False)
    apply(model, policy("sink_window", "sparse"))
    out = logits(model, ids, position_ids=position, use_cache=False)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


def test_no_square_mask_for_causal_and_padded_prompts():
    model, seen = model_of("mistral"), []
    apply(model, policy("sink_window", "sparse"))
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    logits(model, tokens(12))
    logits(model, tokens(40))
    logits(model, tokens(40), attention_mask=(torch.arange(40)[None] > 3).long())
    assert [None if mask is None else list(mask.shape) for mask in seen] == [None, [1, 40], [1, 40]]
    assert seen[1].unique().tolist() == [12]
    assert seen[2].unique().tolist() == [0, 12]


def test_a_deep_copy_is_sparse_and_independent():
    model, ids = model_of("llama"), tokens(40)
    dense = logits(model, ids)
    applied = apply(model, policy("sink_window", "sparse"))
    twin = copy.deepcopy(model)
    sparse = logits(model, ids)
    applied.remove()
    assert torch.equal(logits(twin, ids), sparse)
    remove(twin)
    remove(twin)
    assert torch.equal(logits(twin, ids), dense)
    apply(model, policy("sink_window", "sparse"))
    assert torch.equal(logits(model, ids), sparse)


def test_bad_input(monkeypatch):
    model = model_of("llama")
    with pytest.raises(InputError, match="layers must be among the 2 attention layers, got 2"):
        apply(model, policy("sink_window", "sparse"), layers=[2])
    with pytest.raises(InputError, match="model must be a decoder-only Hugging Face model, got Linear"):
        apply(torch.nn.Linear(2, 2), policy("sink_window", "sparse"))
    with pytest.raises(InputError, match=r"did you mean 'sink_window'"):
        options_for("sink_windows")
    choices = [policy("sink_window", "sparse")]
    with pytest.raises(InputError, match="assignment must have 2 layers, got 3"):
        apply(model, PerHead(choices=choices, assignment=[0, 0, 0]))
    with pytest.raises(InputError, match="assignment must have 4 heads in every layer, got 3"):
        apply(model, PerHead(choices=choices, assignment=[0, [0, 0, 0]]))
    with pytest.raises(ValidationError, match="assignment must index one of the 1 choices, got 1"):
        PerHead(choices=choices, assignment=[1])
    assert model.config._attn_implementation == "eager"
    with monkeypatch.context() as patched:
        patched.setattr("paucity.attention.install.find_rotary", lambda model, layer: 1 // (1 - layer))
        with pytest.raises(ZeroDivisionError):
            apply(model, policy("sink_window", "sparse"))
    with monkeypatch.context() as patched:
        patched.setattr(model, "set_attn_implementation", lambda name: None)
        with pytest.raises(InputError, match="use transformers' attention interface"):
            apply(model, policy("sink_window", "sparse"))
    assert model.config._attn_implementation == "eager"
    assert not any(hasattr(module, ATTRIBUTE) for module in model.modules())
    apply(model, policy("sink_window", "sparse"))
    with pytest.raises(InputError, match="model must carry no prefill policy yet"):
        apply(model, policy("sink_window", "sparse"))
