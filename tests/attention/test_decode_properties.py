"""Properties that every decode policy has, on cached layers and on models: one row per method in `decode_table`."""

import copy
import functools
import json

import pytest
import torch
from torch.nn.functional import pad
from transformers import DynamicCache, StaticCache

from paucity.attention import Knorm, Pages, Prompt, SinkWindow, from_json, to_json
from paucity.attention.apply import apply, apply_step, remove
from paucity.attention.cache import SparseLayer
from paucity.attention.decode.policy import num_read
from paucity.checks import InputError
from paucity.models.applied import Applied
from paucity.models.load import Loaded

from .decode_table import METHODS, ROWS, policy
from .test_apply import CONFIGS, model_of, tokens

methods = pytest.mark.parametrize("method", METHODS)
built = functools.cache(model_of)


@pytest.fixture(autouse=True)
def bare_models():
    yield
    for kind in CONFIGS:
        remove(built(kind))


def test_table_has_every_method():
    assert list(ROWS) == METHODS


# On cached layers.


def layer_of(tokens, batch=2, seed=0, dtype=torch.float32, heads=2):
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(batch, heads, tokens, 8, generator=generator).to(dtype) for _ in range(2))
    layer = SparseLayer()
    layer.update(key, value)
    return layer, torch.randn(batch, 4, 1, 8, generator=generator).to(dtype)


def settle(chosen, query, cached, **options):
    """What a policy chooses in the layer where it is sparse, as pages."""
    for layer in range(2):
        pages = chosen.select(query, cached, Prompt(layer=layer, scale=0.5, num_layers=2, **options))
    if pages is not None:
        return pages
    place = torch.arange(cached.longest).expand(*cached.lengths.shape, -1)
    return Pages(place.masked_fill(place >= cached.lengths.unsqueeze(-1), -1), 1)


def listed(pages, lengths):
    """For each row and KV head, the entries on its pages, by loops."""
    found = {}
    numbers = pages.numbers.expand(*lengths.shape, -1)
    for row in range(lengths.shape[0]):
        for head in range(lengths.shape[1]):
            length = int(lengths[row, head])
            mine = [int(page) for page in numbers[row, head] if page >= 0]
            assert len(set(mine)) == len(mine)
            entries = [e for page in mine for e in range(page * pages.page_size, (page + 1) * pages.page_size)]
            found[row, head] = {entry for entry in entries if entry < length}
    return found


@methods
@pytest.mark.parametrize("length", [1, 30, 47])
def test_only_listed_entries_are_read_and_they_are_counted(method, length):
    layer, query = layer_of(length)
    cached, prompt = layer.cached(torch.tensor([0, length // 3])), Prompt(scale=0.5, layer=1)
    chosen = policy(method, "sparse")
    pages = settle(chosen, query, cached)
    entries = listed(pages, cached.lengths)
    counts = num_read(pages, cached.lengths)
    assert {at: len(found) for at, found in entries.items()} == {at: int(counts[at]) for at in entries}
    assert (counts > 0).all()
    assert length < 30 or (counts < 0.95 * cached.lengths).all()
    before = cached.attend(query, prompt, *pages)
    for (row, head), found in entries.items():
        out = set(range(int(cached.lengths[row, head]))) - found
        places = int(cached.starts[row, head]) + torch.tensor(sorted(out), dtype=torch.long)
        layer.store.keys[places], layer.store.values[places] = torch.nan, torch.nan
    assert torch.equal(cached.attend(query, prompt, *pages), before)
    if hasattr(chosen, "num_keys"):
        assert (counts <= chosen.num_keys).all()


@methods
def test_lists_of_one_batch_choose_as_they_do_alone(method):
    layer, query = layer_of(45, batch=3)
    first = torch.tensor([0, 11, 30])
    chosen = policy(method, "sparse")
    cached = layer.cached(first)
    together = listed(settle(chosen, query, cached), cached.lengths)
    keys, values = cached.store.keys.clone(), cached.store.values.clone()
    for row in range(3):
        alone = SparseLayer()
        begin = layer.store.starts[row] + first[row]
        places = begin.unsqueeze(-1) + torch.arange(45 - int(first[row]))
        alone.update(keys[places][None], values[places][None])
        found = alone.cached()
        assert listed(settle(chosen, query[row : row + 1], found), found.lengths) == {
            (0, head): together[row, head] for head in range(2)
        }


@methods
def test_lists_of_any_lengths_after_an_eviction(method):
    layer, query = layer_of(45)
    keep = torch.rand(2, 2, 45, generator=torch.Generator().manual_seed(3)) < torch.tensor(
        [[[0.9], [0.5]], [[0.2], [1]]]
    )
    layer.evict(keep, layer.store.starts, Knorm())
    cached = layer.cached()
    assert cached.lengths.unique().numel() == 4
    pages = settle(policy(method, "sparse"), query, cached)
    cached.shared.clear()
    for at, found in listed(pages, cached.lengths).items():
        assert 0 < len(found) <= int(cached.lengths[at])
    full = policy(method, "full").attend(query, cached, Prompt(scale=0.5, layer=1))
    torch.testing.assert_close(full.out, cached.attend(query, Prompt(scale=0.5)), atol=1e-5, rtol=1e-5)
    assert torch.equal(full.kept, cached.lengths)


@methods
def test_equal_queries_of_a_group_choose_as_one_does(method):
    layer, query = layer_of(40)
    chosen, cached = policy(method, "sparse"), layer.cached()
    one = settle(chosen, query[:, :2], cached)
    cached.shared.clear()
    cached.memory.clear()
    many = settle(chosen, query[:, :2].repeat_interleave(3, dim=1), cached)
    assert listed(one, cached.lengths) == listed(many, cached.lengths)


@methods
@pytest.mark.parametrize("options", [{"window": 9}, {"softcap": 2.0}, {"window": 12, "softcap": 1.0}])
def test_window_and_softcap_of_the_model_hold(method, options):
    layer, query = layer_of(40)
    cached, prompt = layer.cached(torch.tensor([0, 7])), Prompt(layer=0, scale=0.5, **options)
    done = policy(method, "full").attend(query, cached, prompt)
    torch.testing.assert_close(done.out, cached.attend(query, prompt), atol=1e-5, rtol=1e-5)
    pages = settle(policy(method, "sparse"), query, cached, **options)
    assert (num_read(pages, cached.lengths, prompt.window) > 0).all()


@methods
def test_deterministic_and_bfloat16_and_empty(method):
    layer, query = layer_of(40, dtype=torch.bfloat16)
    chosen, cached = policy(method, "sparse"), layer.cached()
    once = settle(chosen, query, cached).numbers
    cached.shared.clear()
    assert torch.equal(once, settle(chosen, query, cached).numbers)
    prompt = Prompt(scale=0.5, layer=1)
    done = policy(method, "full").attend(query, cached, prompt)
    assert done.out.dtype == torch.bfloat16
    torch.testing.assert_close(done.out, cached.attend(query, prompt), atol=2e-2, rtol=2e-2)
    layer, query = layer_of(40, batch=0)
    assert policy(method, "sparse").attend(query, layer.cached(), prompt).out.shape == (0, 4, 1, 8)


@methods
@pytest.mark.parametrize("which", ["full", "sparse"])
def test_json_round_trip_and_recipes(method, which):
    made = policy(method, which, layers=[1])
    data = json.loads(json.dumps(to_json(made)))
    assert data["method"] == method
    assert from_json(data) == made
    applied = apply_step(Loaded(model=built("llama"), tokenizer=None, source="test"), method, made, [])
    assert isinstance(applied, Applied)
    assert applied.state()["method"] == method
    assert type(made)(**json.loads(json.dumps(applied.state()))["options"]) == made


# On models.


@torch.no_grad()
def follow(model, ids, prompt, cache=None, **options):
    """Logits of a prompt and of the tokens after it, read one by one."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts = [part for part in (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)) if part.shape[1]]
    out, end = [], options["attention_mask"].shape[1] - ids.shape[1] if options else 0
    for part in parts:
        begin, end = end, end + part.shape[1]
        given = {}
        if options:
            given = {"attention_mask": options["attention_mask"][:, :end]}
            given["position_ids"] = options["position_ids"][:, begin:end]
        out.append(model(input_ids=part, past_key_values=cache, **given).logits)
    return torch.cat(out, dim=1)


def left_padded(rows):
    """Token ids, mask and positions of texts of different lengths."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.cat([pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows])
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@methods
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_full_budget_is_dense_token_by_token_and_removal_is_exact(method, kind):
    model, ids = built(kind), tokens(36, 2)
    with torch.no_grad():
        dense = model(ids).logits
    applied = apply(model, policy(method, "full"))
    torch.testing.assert_close(follow(model, ids, 22), dense, atol=1e-5, rtol=1e-5)
    assert set(applied.density().values()) == (set() if kind == "mistral" else {1.0})
    sliding = {"gemma2": 1, "gemma3": 1, "mistral": 2}.get(kind, 0)
    note = {"a cache layer of another kind (DynamicSlidingWindowLayer)": 15 * sliding} if sliding else {}
    assert applied.state()["dense_steps"] == note
    applied.remove()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)
    assert model.config._attn_implementation == "eager"


@methods
@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "llama"])
def test_a_padded_batch_is_what_its_rows_are_alone(method, kind):
    model, rows = built(kind), [tokens(44), tokens(31, seed=1)]
    ids, options = left_padded(rows)
    with torch.no_grad():
        dense = model(ids, **options).logits
    applied = apply(model, policy(method, "sparse"))
    alone = [follow(model, row, row.shape[1] - 12) for row in rows]
    applied.reset()
    together = follow(model, ids, 32, **options)
    torch.testing.assert_close(together[:1], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1:, 13:], alone[1], atol=1e-5, rtol=1e-5)
    if kind != "gemma3" or method != "tidal":  # there only one layer is cached whole, and that one chooses
        assert sum(applied.density().values()) < 0.95 * len(applied.density())
        assert (together - dense)[:, 32:].abs().max() > 1e-3


@methods
def test_rows_below_min_length_read_everything(method):
    model, rows = built("llama"), [tokens(44), tokens(20, seed=1)]
    ids, options = left_padded(rows)
    with torch.no_grad():
        dense = model(ids, **options).logits
    applied = apply(model, policy(method, "sparse", min_length=24))
    found = follow(model, ids, 36, **options)
    torch.testing.assert_close(found[1, 24:], dense[1, 24:], atol=1e-5, rtol=1e-5)
    assert (found[0] - dense[0]).abs().max() > 1e-3
    assert follow(model, rows[1], 12).isfinite().all()
    assert applied.state()["dense_steps"] == {"cache shorter than min_length": 16}


@methods
def test_a_cropped_cache_goes_on_as_if_it_had_never_been_longer(method):
    model, ids, other = built("llama"), tokens(44), tokens(9, seed=5)
    apply(model, policy(method, "sparse"))
    wanted, cache = follow(model, ids, 24), DynamicCache(config=model.config)
    follow(model, ids[:, :31], 24, cache)
    follow(model, other, 0, cache)
    cache.crop(-9)
    assert cache.get_seq_length() == 31
    torch.testing.assert_close(follow(model, ids[:, 31:], 0, cache), wanted[:, 31:], atol=1e-5, rtol=1e-5)
    cache.crop(-17)
    torch.testing.assert_close(follow(model, ids[:, 27:], 0, cache), wanted[:, 27:], atol=1e-5, rtol=1e-5)


@methods
def test_rows_of_a_cache_move(method):
    model, ids, after = built("llama"), tokens(30, 3), tokens(8, 3, seed=4)
    apply(model, policy(method, "sparse"))
    cache = DynamicCache(config=model.config)
    follow(model, ids, 24, cache)
    for change, rows in (
        (lambda held: held.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda held: held.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda held: held.batch_select_indices(torch.tensor([1])), [1]),
    ):
        moved = copy.deepcopy(cache)
        change(moved)
        new = after[torch.arange(len(rows)) % 3]
        found = follow(model, new, 0, moved)
        whole = follow(model, torch.cat([ids[rows], new], dim=1), 24)
        torch.testing.assert_close(found, whole[:, 30:], atol=1e-5, rtol=1e-5)


@methods
def test_several_turns_and_copies(method):
    model, ids = built("llama"), tokens(52)
    with torch.no_grad():
        dense = model(ids).logits
    applied = apply(model, policy(method, "full"))
    cache = DynamicCache(config=model.config)
    turns = [follow(model, ids[:, begin:end], prompt, cache) for begin, end, prompt in ((0, 26, 20), (26, 52, 11))]
    torch.testing.assert_close(torch.cat(turns, dim=1), dense, atol=1e-5, rtol=1e-5)
    applied.remove()
    apply(model, policy(method, "sparse"))
    cache = DynamicCache(config=model.config)
    follow(model, ids[:, :40], 30, cache)
    twin, sparse = copy.deepcopy(cache), copy.deepcopy(model)
    follow(model, tokens(5, seed=9), 0, cache)
    wanted = follow(model, ids, 30)[:, 40:]
    torch.testing.assert_close(follow(sparse, ids[:, 40:], 0, twin), wanted, atol=1e-5, rtol=1e-5)


@methods
def test_generation_of_every_kind(method):
    model, ids = built("llama"), tokens(24, 2)
    ways = ({"do_sample": False}, {"do_sample": True, "top_k": 5}, {"do_sample": False, "num_beams": 3})

    def generate(**options):
        torch.manual_seed(0)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, pad_token_id=0, **options)

    dense = [generate(**way) for way in ways]
    applied = apply(model, policy(method, "full"))
    for way, wanted in zip(ways, dense, strict=True):
        assert torch.equal(generate(**way), wanted)
    applied.remove()
    apply(model, policy(method, "sparse"))
    for way in ways:
        assert torch.equal(generate(**way), generate(**way))


@methods
def test_with_other_kinds_of_policies(method):
    model, ids = built("llama"), tokens(44)
    evicting = apply(model, Knorm(num_keys=20, every=4))
    wanted = follow(model, ids, 30)
    decoding = apply(model, policy(method, "full"))
    torch.testing.assert_close(follow(model, ids, 30), wanted, atol=1e-5, rtol=1e-5)
    decoding.remove()
    decoding = apply(model, policy(method, "sparse"))
    apply(model, SinkWindow(num_sinks=2, window_size=5, min_length=0))
    assert follow(model, ids, 30).isfinite().all()
    assert sum(decoding.density().values()) < 2
    assert all(share < 1 for share in evicting.density().values())


@methods
def test_where_there_is_nothing_to_choose_from(method):
    model, ids = built("llama"), tokens(20)
    with torch.no_grad():
        dense = model(ids).logits
        applied = apply(model, policy(method, "sparse"))
        torch.testing.assert_close(model(ids, use_cache=False).logits, dense, atol=1e-5, rtol=1e-5)
        assert applied.state()["dense_steps"] == {"no cache": 2}
        applied.reset()
        static = StaticCache(config=model.config, max_cache_len=24)
        torch.testing.assert_close(follow(model, ids, 16, static), dense, atol=1e-5, rtol=1e-5)
        assert "a cache layer of another kind (StaticLayer)" in applied.state()["dense_steps"]
        assert applied.density() == {}
    assert follow(model, tokens(6), 1).isfinite().all()


def test_a_cache_that_another_policy_evicted_from_is_refused():
    model, ids = built("llama"), tokens(30)
    evicting, cache = apply(model, Knorm(num_keys=9)), DynamicCache(config=model.config)
    follow(model, ids, 30, cache)
    evicting.remove()
    apply(model, policy("quest", "sparse"))
    with pytest.raises(InputError, match="must carry the eviction policy that the cache is from"):
        follow(model, ids[:, :1], 0, cache)
