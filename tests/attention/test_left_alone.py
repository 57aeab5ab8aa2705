"""Models and caches that policies of steps and caches leave alone or refuse, and what is left of them afterwards."""

import gc
import pickle
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from paucity.attention import Knorm, PagedSelection, Prompt, Quantised, Quest, SnapKV, StreamingLLM, TopP
from paucity.attention.apply import apply, remove
from paucity.attention.cache import SparseLayer
from paucity.attention.decode import BlockTopKDecode
from paucity.attention.decode.quest import bound_scores
from paucity.attention.decode.scores import exact_weights
from paucity.attention.site import _own_layer
from paucity.checks import InputError

from .test_apply import model_of, tokens
from .test_decode_properties import follow

FULL = [Quest(num_keys=999, min_length=0, dense_layers=0), Knorm(num_keys=999)]
SIZE = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
CHANGED = {
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 2, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 16, "first_k_dense_replace": 2,
    },
}  # fmt: skip


def changed_model(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZE, **CHANGED[kind])).eval()


@pytest.mark.parametrize("policy", FULL, ids=["decode", "eviction"])
@pytest.mark.parametrize("kind", list(CHANGED))
def test_keys_that_are_changed_after_the_cache_are_read_by_the_model(kind, policy):
    model, ids = changed_model(kind), tokens(36, 2)
    dense = follow(model, ids, 30)
    for prompt in (30, 1):
        applied = apply(model, policy)
        torch.testing.assert_close(follow(model, ids, prompt), dense, atol=1e-5, rtol=1e-5)
        assert any("keys that are changed after the cache" in str(value) for value in applied.state().values())
        applied.remove()


@pytest.mark.parametrize("policy", FULL, ids=["decode", "eviction"])
def test_layers_that_share_keys_are_refused(policy):
    model = model_of("llama")
    model.model.layers[1].self_attn.is_kv_shared_layer = True
    with pytest.raises(InputError, match="model must have keys of its own in every layer"):
        apply(model, policy)


def test_another_attention_set_later_is_dense_and_said_so():
    model, ids = model_of("llama"), tokens(36)
    dense = follow(model, ids, 30)
    applied = apply(model, Quest(num_keys=8, page_size=4, min_length=0))
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(follow(model, ids, 30), dense, atol=1e-5, rtol=1e-5)
    assert set(applied.state()["dense_steps"]) == {"attention of another kind"}
    with pytest.raises(InputError, match="model must have the attention of its other policies, got sdpa"):
        apply(model, Knorm())


@pytest.mark.parametrize("policy", FULL, ids=["decode", "eviction"])
def test_gradients_reach_the_keys_of_a_prefix(policy):
    model, ids, found = model_of("llama"), tokens(9), []
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2, 5, 8, generator=generator) for _ in range(4)]
    for sparse in (False, True):
        prefix, cache = [x.clone().requires_grad_() for x in given], DynamicCache(config=model.config)
        for layer in range(2):
            cache.update(prefix[2 * layer], prefix[2 * layer + 1], layer)
        if sparse:
            apply(model, policy)
        model(ids, past_key_values=cache).logits.square().sum().backward()
        found.append([x.grad for x in prefix])
    for dense, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", FULL, ids=["decode", "eviction"])
def test_a_call_outside_no_grad_is_as_any_other(policy):
    model, ids = model_of("llama"), tokens(9)
    dense = model(ids).logits
    applied = apply(model, policy)
    for cache in (None, DynamicCache(), DynamicCache(config=model.config)):
        out = model(ids[:, :8], past_key_values=cache)
        last = model(ids[:, 8:], past_key_values=out.past_key_values).logits
        torch.testing.assert_close(torch.cat([out.logits, last], dim=1), dense, atol=1e-5, rtol=1e-5)
    assert set(applied.density().values()) == {1.0}
    model.train()
    applied.reset()
    model(ids).logits.sum().backward()
    assert applied.density() == {}
    assert "gradients" in str(applied.state())


def test_an_offloaded_cache_is_left_alone():
    cache = DynamicCache()
    cache.offloading = True
    assert _own_layer(cache, 0, False) == (None, "an offloaded cache")


@pytest.mark.parametrize(
    "policy",
    [
        Knorm(num_keys=9),
        SnapKV(num_keys=9, window_size=4),
        PagedSelection(num_keys=64, min_length=0),
        TopP(min_length=0),
    ],
    ids=["knorm", "snapkv", "paged", "top_p"],
)
def test_nothing_keeps_a_cache_alive_and_models_can_be_saved(policy):
    model, ids = model_of("llama"), tokens(40)
    applied = apply(model, policy)
    before = len(pickle.dumps(model))
    cache = DynamicCache(config=model.config)
    follow(model, ids, 36, cache)
    stores = [weakref.ref(layer.store) for layer in cache.layers]
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(follow(model, ids[:, :1], 0, again), follow(model, ids[:, :1], 0, cache))
    del cache, again
    gc.collect()
    assert [store() for store in stores] == [None, None]
    assert len(pickle.dumps(model)) < before + 20_000  # counts alone
    assert applied.density()


def test_a_prefix_that_was_read_in_inference_mode_goes_on():
    model, ids = model_of("llama"), tokens(40)
    apply(model, Quest(num_keys=8, page_size=4, min_length=0))
    wanted, cache = follow(model, ids, 30), DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :30], past_key_values=cache)
    torch.testing.assert_close(follow(model, ids[:, 30:], 0, cache), wanted[:, 30:], atol=1e-5, rtol=1e-5)


def test_keys_can_be_looked_at_until_some_are_gone():
    model, ids = model_of("llama"), tokens(30)
    cache, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
    follow(model, ids, 28, plain)
    apply(model, Knorm(num_keys=1000))
    follow(model, ids, 28, cache)
    for (key, value, *_), (other, another, *_) in zip(cache, plain, strict=True):
        torch.testing.assert_close(key, other)
        torch.testing.assert_close(value, another)
    remove(model)
    apply(model, Knorm(num_keys=7))
    follow(model, ids, 28, cache := DynamicCache(config=model.config))
    with pytest.raises(InputError, match="keys must all be there, got a layer that was evicted from"):
        _ = cache.layers[0].keys
    cache.layers[0].expected = True
    with pytest.raises(InputError, match=r"cache: key_states must have shape \[1, 2, any, 8\], got \[3, 2, 1, 8\]"):
        cache.layers[0].update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8))


def test_sinks_stay_whatever_the_budget():
    model, ids = model_of("llama"), tokens(103)
    apply(model, StreamingLLM(density=0.02))
    follow(model, ids, 100, cache := DynamicCache(config=model.config))
    store = cache.layers[0].store
    places = store.starts[0, 0] + torch.arange(int(store.lengths[0, 0]))
    assert store.positions[places].tolist() == [0, 1, 2, 3, 102]


@pytest.mark.parametrize(("num_keys", "pages"), [(16, [12]), (32, [11, 12]), (96, [0, 8, 9, 10, 11, 12])])
def test_the_newest_pages_have_the_room_that_there_is(num_keys, pages):
    layer = SparseLayer()
    layer.update(*torch.randn(2, 1, 2, 201, 8))
    chosen = BlockTopKDecode(num_keys=num_keys, min_length=0, dense_layers=0)
    found = chosen.select(torch.randn(1, 4, 1, 8), layer.cached(), Prompt(layer=0, scale=0.3))
    assert sorted(found.numbers[0, 0].tolist()) == pages


def test_half_precision_does_not_overflow_before_the_scale():
    key = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0)) * 200
    key = key.half().float()
    found = []
    for dtype in (torch.float32, torch.float16):
        layer = SparseLayer()
        layer.update(key.to(dtype), key.to(dtype))
        query = key[:, :, 5:6].repeat_interleave(2, dim=1).to(dtype)
        prompt = Prompt(layer=0, scale=1e-5)
        bounds = torch.cat([key, key], dim=-1).to(dtype)
        found.append((exact_weights(query, layer.cached(), prompt), bound_scores(query, bounds, "max").float()))
    for exact, half in zip(*found, strict=True):
        torch.testing.assert_close(half, exact, atol=2e-3, rtol=2e-3)


def test_values_of_another_width_with_nothing_packed_yet():
    layer, query = SparseLayer(), torch.randn(1, 4, 1, 8)
    layer.update(torch.randn(1, 2, 60, 8), torch.randn(1, 2, 60, 6))
    policy, prompt = Quantised(), Prompt(layer=0, scale=0.3)
    policy.put_away(layer.store)
    out = policy.attend(query, layer.cached(), prompt)
    torch.testing.assert_close(out, layer.cached().attend(query, prompt))


class Mine(Knorm):
    """A policy that is in no catalogue."""

    how: str = "right"

    def score(self, query, cached, prompt):
        score = super().score(query, cached, prompt)
        return score[..., :-1] if self.how == "short" else score * torch.nan if self.how == "nan" else score


def test_policies_of_a_users_own():
    model, ids = model_of("llama"), tokens(30)
    applied = apply(model, Mine(num_keys=9))
    follow(model, ids, 28)
    assert applied.state()["method"] == "Mine"
    applied.remove()
    apply(model, Mine(num_keys=9, how="nan"))
    assert follow(model, ids, 28).isfinite().all()
    remove(model)
    apply(model, Mine(num_keys=9, how="short"))
    with pytest.raises(InputError, match=r"Mine: score must have shape \[1, 2, 28\], got \[1, 2, 27\]"):
        follow(model, ids, 28)
