"""Properties that every eviction policy has: one row per method, one per model."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from paucity.attention import OracleTopK, SinkWindow
from paucity.attention.apply import apply, apply_step, remove
from paucity.attention.eviction import Knorm
from paucity.attention.portable import options_for
from paucity.checks import InputError
from paucity.models.load import Loaded

from .eviction_table import BUDGET, METHODS, ROWS, policy
from .test_apply import SIZE, logits, model_of, tokens

methods = pytest.mark.parametrize("method", METHODS)
STEPS = 12


def whole_cache(model):
    """A cache without sliding layers, so that there is something to evict in all models."""
    return DynamicCache(config=model.config)


def run(model, ids, prompt, *, turn=0, cache=None, **options):
    """Logits of a prompt, of single steps after it and of a last turn of several tokens, side by side."""
    cache = whole_cache(model) if cache is None else cache
    steps = [1] * (ids.shape[1] - prompt - turn)
    parts, start = [], 0
    for size in [n for n in (prompt, *steps, turn) if n]:
        part = {
            name: value[:, : start + size] if name == "attention_mask" else value[:, start : start + size]
            for name, value in options.items()
        }
        parts.append(logits(model, ids[:, start : start + size], past_key_values=cache, **part))
        start += size
    return torch.cat(parts, dim=1), cache


def stores(cache):
    return [layer.store for layer in cache.layers if hasattr(layer, "store")]


def test_table_has_every_method():
    assert list(ROWS) == METHODS


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "gpt2", "llama", "mistral"])
@methods
def test_full_budget_is_dense_step_by_step_and_removal_is_exact(kind, method):
    model, ids = model_of(kind), tokens(33, 2)
    dense, before = logits(model, ids), run(model, ids, 16, turn=5)[0]
    if kind == "gpt2" and ROWS[method].rotary:
        apply(model, policy(method, "full"))
        with pytest.raises(InputError, match=f"{method}: .* position embedding"):
            run(model, ids, 16)
        return
    applied = apply(model, policy(method, "full"))
    torch.testing.assert_close(run(model, ids, 16, turn=5)[0], dense, atol=1e-5, rtol=1e-5)
    assert set(applied.density().values()) == (set() if kind == "mistral" else {1.0})
    applied.remove()
    assert torch.equal(run(model, ids, 16, turn=5)[0], before)
    assert model.config._attn_implementation == "eager"


@methods
def test_budget_is_kept_and_memory_falls(method):
    model, ids = model_of("llama"), tokens(40 + STEPS)
    full = apply(model, policy(method, "full"))
    whole = run(model, ids, 40)[1]
    full.remove()
    applied = apply(model, policy(method, "sparse", every=3))
    found, cache = run(model, ids, 40)
    assert found.isfinite().all()
    assert all(store.num_entries.tolist() == [[40 + STEPS] * 2] for store in stores(whole))
    assert sum(store.num_bytes for store in stores(cache)) < sum(store.num_bytes for store in stores(whole))
    kept = torch.cat([store.num_entries for store in stores(cache)]).double()
    late = 2 * 3 + 4 if method == "quantised" else 0  # it evicts when it packs
    assert BUDGET - 3 < kept.mean() <= BUDGET + late
    if ROWS[method].even:
        assert ((kept <= BUDGET + late) & (kept > BUDGET - 3)).all()
    seen = sum(range(40, 40 + STEPS + 1))
    assert (
        (BUDGET - 3) * (STEPS + 1) / seen < sum(applied.density().values()) / 2 < (BUDGET + late) * (STEPS + 1) / seen
    )


@methods
def test_memory_is_that_of_the_entries(method):
    model, ids = model_of("llama"), tokens(200)
    apply(model, policy(method, "sparse"))
    dense = 200 * 2 * 2 * 8 * 4
    for store in stores(run(model, ids, 200)[1]):
        room = (64 * 2) * (2 * 8 * 4 + 8)  # what each list may grow by, positions and figures included
        queries = 0 if store.recent is None else store.recent.numel() * 4
        assert store.num_bytes - room - queries < 0.2 * dense
        assert store.lengths.max() <= BUDGET * 2


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # with Qwen3's normed keys the norms of `knorm` are all equal
@methods
def test_rows_of_a_padded_batch_are_as_alone(kind, method):
    model, long, short = model_of(kind), tokens(40 + STEPS), tokens(29 + STEPS, seed=1)
    applied = apply(model, policy(method, "sparse"))
    alone = [run(model, ids, length, turn=4)[0] for ids, length in ((long, 40), (short, 29))]
    single = applied.density()
    batch = torch.cat([long, torch.nn.functional.pad(short, (11, 0))])
    mask = torch.arange(40 + STEPS) >= torch.tensor([[0], [11]])
    options = {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
    applied.reset()
    together, _ = run(model, batch, 40, turn=4, **options)
    torch.testing.assert_close(together[:1], alone[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[1:, 11:], alone[1], atol=1e-4, rtol=1e-4)
    assert applied.density() == pytest.approx(single)


@pytest.mark.parametrize("method", [name for name in METHODS if ROWS[name].by_key])
def test_grouped_heads_equal_repeated_heads(method):
    grouped = model_of("llama")
    wide = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZE, "num_key_value_heads": 4})).eval()
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    wide.load_state_dict(weights)
    found = []
    for model in (grouped, wide):
        apply(model, policy(method, "sparse"))
        found.append(run(model, tokens(40), 29)[0])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@methods
def test_what_is_taken_back_was_never_there(method):
    model, ids = model_of("llama"), tokens(40)
    apply(model, policy(method, "sparse", every=0))
    straight = run(model, ids, 33)[0][:, 33:]
    cache = whole_cache(model)
    run(model, ids[:, :33], 33, cache=cache)
    for step in tokens(3, seed=5).split(1, dim=1):
        logits(model, step, past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 33
    again = torch.cat([logits(model, one, past_key_values=cache) for one in ids[:, 33:].split(1, dim=1)], dim=1)
    torch.testing.assert_close(again, straight, atol=ROWS[method].error, rtol=ROWS[method].error)


@methods
def test_rows_can_be_chosen_repeated_and_reordered(method):
    model, ids, more = model_of("llama"), tokens(32, 3), tokens(6, 3, seed=3)
    apply(model, policy(method, "sparse"))
    caches = [run(model, ids, 30)[1] for _ in range(3)]
    expected = logits(model, more[:, :1], past_key_values=copy.deepcopy(caches[0]))
    turn = logits(model, more, past_key_values=copy.deepcopy(caches[0]))
    caches[0].reorder_cache(torch.tensor([2, 0, 0]))
    caches[1].batch_repeat_interleave(2)
    caches[2].batch_select_indices(torch.tensor([1]))
    for cache, rows in zip(caches, ([2, 0, 0], [0, 0, 1, 1, 2, 2], [1]), strict=True):
        twin = copy.deepcopy(cache)
        found = logits(model, more[rows, :1], past_key_values=cache)
        torch.testing.assert_close(found, expected[rows], atol=1e-5, rtol=1e-5)
        found = logits(model, more[rows], past_key_values=twin)
        torch.testing.assert_close(found, turn[rows], atol=1e-5, rtol=1e-5)


@methods
def test_generates_greedily_by_sampling_and_with_beams(method):
    model, ids = model_of("llama"), tokens(30, 2)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "pad_token_id": 0}
    ways = ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False})

    def generated():
        torch.manual_seed(0)
        return [model.generate(ids, **options, **way) for way in ways]

    dense = generated()
    applied = apply(model, policy(method, "full"))
    assert all(torch.equal(one, other) for one, other in zip(generated(), dense, strict=True))
    applied.remove()
    apply(model, policy(method, "sparse"))
    first = generated()
    assert all(torch.equal(one, other) for one, other in zip(generated(), first, strict=True))
    alone = model.generate(ids[1:], **{**options, "attention_mask": torch.ones(1, 30).long()}, **ways[2])
    assert torch.equal(alone, first[2][1:])


@methods
def test_options_travel_as_json(method):
    made = policy(method, "sparse", layers=[1])
    assert options_for(method).model_validate_json(made.model_dump_json()) == made
    model = model_of("llama")
    state = apply_step(Loaded(model=model, tokenizer=None, source="test"), method, made, []).state()
    assert state["method"] == method
    assert options_for(method)(**json.loads(json.dumps(state))["options"]) == made
    store = stores(run(model, tokens(40), 40)[1])
    assert store[0].num_entries.tolist() == [[40, 40]]
    assert store[1].num_entries.max() < 40


@methods
def test_bfloat16_and_one_token(method):
    model = model_of("llama", torch.bfloat16)
    apply(model, policy(method, "sparse"))
    assert run(model, tokens(40), 30, turn=4)[0].isfinite().all()
    assert run(model, tokens(20), 1)[0].isfinite().all()


@methods
def test_together_with_policies_of_the_other_kinds(method):
    model, ids = model_of("llama"), tokens(40)
    applied = apply(model, policy(method, "sparse"))
    window = apply(model, SinkWindow(num_sinks=2, window_size=9, min_length=0, q_block=8))
    if applied.policy.own_attention:
        with pytest.raises(InputError, match="leave the attention of single steps to one policy"):
            apply(model, OracleTopK(num_keys=4, min_length=0))
    else:
        alone = run(model, ids, 32)[0]
        reads = apply(model, OracleTopK(num_keys=1000, min_length=0))
        torch.testing.assert_close(run(model, ids, 32)[0], alone, atol=1e-5, rtol=1e-5)
        assert set(reads.density().values()) == {1.0}
    assert all(share < 0.9 for share in window.density().values())
    remove(model)


@methods
def test_other_caches_and_no_cache_are_dense_and_said_so(method):
    model, ids = model_of("llama"), tokens(30)
    dense = logits(model, ids)
    applied = apply(model, policy(method, "sparse"))
    torch.testing.assert_close(logits(model, ids, use_cache=False), dense, atol=1e-5, rtol=1e-5)
    static = StaticCache(config=model.config, max_cache_len=64)
    torch.testing.assert_close(run(model, ids, 20, cache=static)[0], dense, atol=1e-5, rtol=1e-5)
    assert set(applied.state()["whole_caches"]) == {
        "no cache",
        "a cache layer of another kind (StaticLayer)",
        "mask of another kind",
    }


@methods
def test_a_cache_of_another_policy_is_refused(method):
    model, ids = model_of("llama"), tokens(40)
    applied = apply(model, policy(method, "sparse"))
    cache = run(model, ids, 40)[1]
    applied.remove()
    with pytest.raises(InputError, match="model must carry the eviction policy that the cache is from"):
        logits(model, ids[:, :1], past_key_values=copy.deepcopy(cache))
    apply(model, Knorm(num_keys=5))
    with pytest.raises(InputError, match="model must carry the eviction policy that the cache is from"):
        logits(model, ids[:, :1], past_key_values=cache)


@methods
def test_sliding_layers_are_left_alone_in_any_cache(method):
    model, ids = model_of("mistral"), tokens(30)
    dense = logits(model, ids)
    applied = apply(model, policy(method, "sparse", num_keys=6) if method != "quantised" else policy(method, "sparse"))
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        torch.testing.assert_close(run(model, ids, 10, cache=cache)[0], dense, atol=1e-5, rtol=1e-5)
    assert applied.density() == {}
