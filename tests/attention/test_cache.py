"""The lists of a cached layer against Python lists, whatever happens to them; and transformers' ways with a cache."""

import copy
import random

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from paucity.attention import Knorm, OracleTopK, Quest, StreamingDecode, Tidal, Tova
from paucity.attention.apply import apply, remove
from paucity.attention.cache import SparseLayer
from paucity.attention.cache.page_index import PageIndex
from paucity.attention.decode.quest import extremes
from paucity.checks import InputError

from .test_apply import model_of, tokens
from .test_decode_properties import follow

POLICY = Knorm()


def new_tokens(generator, batch, count):
    return [torch.randn(batch, 2, count, width, generator=generator) for width in (4, 3)]


class Naive:
    """A layer as lists of ``(position, key, value, figure)``, for each row and KV head."""

    def __init__(self, batch):
        self.lists, self.seen = [[[], []] for _ in range(batch)], 0

    def append(self, key, value):
        for row, heads in enumerate(self.lists):
            for head, entries in enumerate(heads):
                for i in range(key.shape[2]):
                    entries.append((self.seen + i, key[row, head, i], value[row, head, i], 0.0))
        self.seen += key.shape[2]

    def crop(self, count):
        self.seen -= count
        self.lists = [[[e for e in entries if e[0] < self.seen] for entries in heads] for heads in self.lists]

    def select(self, rows):
        self.lists = [[list(entries) for entries in self.lists[row]] for row in rows]

    def evict(self, keep):
        self.lists = [
            [[e for e, kept in zip(entries, keep[row, head].tolist(), strict=False) if kept] for head, entries in heads]
            for row, heads in ((row, list(enumerate(heads))) for row, heads in enumerate(self.lists))
        ]

    def set_figures(self, figures):
        for row, heads in enumerate(self.lists):
            for head, entries in enumerate(heads):
                heads[head] = [(*e[:3], float(figures[row, head, i])) for i, e in enumerate(entries)]


def check(layer, naive):
    cached = layer.cached()
    assert layer.get_seq_length() == naive.seen == cached.num_seen
    assert cached.lengths.tolist() == [[len(entries) for entries in heads] for heads in naive.lists]
    parts = cached.positions(), cached.keys(), cached.values(), cached.extra("figure")
    assert all(part.isfinite().all() for part in parts)
    for row, heads in enumerate(naive.lists):
        for head, entries in enumerate(heads):
            for part, column in zip(parts, zip(*entries, strict=True), strict=False):
                wanted = torch.stack([torch.as_tensor(x) for x in column]).to(part.dtype)
                assert torch.equal(part[row, head, : len(entries)], wanted)
    used = [
        range(s, s + n)
        for s, n in zip(cached.starts.flatten().tolist(), cached.lengths.flatten().tolist(), strict=True)
    ]
    assert len(set().union(*used)) == sum(map(len, used))  # no two lists share a place


@pytest.mark.parametrize("seed", range(8))
def test_lists_are_what_python_lists_are(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layer, naive = SparseLayer(), Naive(3)
    for _ in range(25):
        batch = len(naive.lists)
        what = rng.choice(["one", "one", "many", "crop", "rows", "evict", "figures"]) if naive.seen else "many"
        if what in ("one", "many"):
            key, value = new_tokens(generator, batch, 1 if what == "one" else rng.choice([5, 70]))
            layer.expected = layer.policy is not None
            layer.update(key, value)
            naive.append(key, value)
        elif what == "crop":
            count = rng.randint(1, min(naive.seen, 9))
            layer.crop(-count)
            naive.crop(count)
        elif what == "rows":
            rows = [rng.randrange(batch) for _ in range(rng.randint(1, 4))]
            layer.batch_select_indices(torch.tensor(rows))
            naive.select(rows)
        elif what == "evict":
            cached = layer.cached()
            keep = (torch.rand(*cached.lengths.shape, cached.longest, generator=generator) < 0.6) & cached.inside()
            layer.evict(keep, cached.starts, POLICY)
            naive.evict(keep)
        else:
            cached = layer.cached()
            figures = torch.rand(*cached.lengths.shape, cached.longest, generator=generator)
            cached.set_extra("figure", figures)
            naive.set_figures(figures)
        check(layer, naive)


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("page_size", [1, 4, 7])
@pytest.mark.parametrize("seed", range(4))
def test_page_summaries_are_those_of_the_pages(seed, page_size, partial):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layer, first = SparseLayer(), torch.tensor([0, 3, 8])
    layer.update(*new_tokens(generator, 3, rng.choice([8, 9, 12, 29])))
    for _ in range(25):
        cached = layer.cached(first)
        for _ in range(rng.choice([0, 1, 2])):  # perhaps it is not asked for a while, or twice
            (found,) = cached.index("extremes", page_size, extremes, partial=partial)
            assert found.isfinite().all()
            keys, size = cached.keys(), page_size
            for row, head in torch.cartesian_prod(torch.arange(len(first)), torch.arange(2)).tolist():
                length = int(cached.lengths[row, head])
                for page in range(-(-length // size) if partial else length // size):
                    mine = keys[row, head, page * size : min(length, page * size + size)]
                    assert torch.equal(found[row, head, page], torch.cat([mine.amax(0), mine.amin(0)]))
        what = rng.choice(["one"] * 6 + ["many", "crop", "crop", "rows"])
        if what in ("one", "many"):
            layer.update(*new_tokens(generator, len(first), 1 if what == "one" else 11))
        elif what == "crop":
            layer.crop(-rng.randint(0, min(9, layer.seen - 8)))
        else:
            rows = torch.tensor([rng.randrange(len(first)) for _ in range(rng.randint(1, 4))])
            layer.batch_select_indices(rows)
            first = first[rows]


def test_an_index_follows_other_padding_and_evictions():
    layer, generator = SparseLayer(), torch.Generator().manual_seed(0)
    layer.update(*new_tokens(generator, 2, 20))
    one = layer.cached().index("extremes", 4, extremes)[0][:, :, 0].clone()
    other = layer.cached(torch.tensor([1, 5])).index("extremes", 4, extremes)[0][:, :, 0].clone()
    assert not torch.equal(one, other)
    assert torch.equal(layer.cached().index("extremes", 4, extremes)[0][:, :, 0], one)
    assert layer.cached().index("extremes", 5, extremes)[0].shape[2] != 0
    layer.evict(torch.rand(2, 2, 20, generator=generator) < 0.5, layer.store.starts, POLICY)
    cached = layer.cached()
    (found,) = cached.index("extremes", 4, extremes)
    mine = cached.keys()[1, 1, :4]
    assert torch.equal(found[1, 1, 0], torch.cat([mine.amax(0), mine.amin(0)]))


def test_summaries_are_made_once(monkeypatch):
    added, add = [], PageIndex._add
    monkeypatch.setattr(PageIndex, "_add", lambda self, *args: (added.append(args[-1]), add(self, *args)))
    layer, generator = SparseLayer(), torch.Generator().manual_seed(0)
    layer.update(*new_tokens(generator, 2, 30))
    for _ in range(10):
        layer.cached().index("extremes", 8, extremes, partial=False)
        layer.update(*new_tokens(generator, 2, 1))
    assert added == [3, 1]


def test_it_is_a_dynamic_layer_until_something_is_evicted():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = SparseLayer(), DynamicLayer()
    for count in (9, 1, 1, 80, 3):
        new = new_tokens(generator, 2, count)
        for found, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, wanted)
        assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)
    for change in (
        lambda layer: layer.crop(-7),
        lambda layer: layer.crop(0),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([True, False, False, True, False, True])),
        lambda layer: layer.reset(),
    ):
        change(ours)
        change(theirs)
        if ours.seen:
            new = new_tokens(generator, len(theirs.keys), 2)
            for found, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
                assert torch.equal(found, wanted)
    assert ours.get_seq_length() == 0
    assert ours.get_max_length() == -1


def test_memory_is_given_back_and_forgotten_is_forgotten():
    layer, generator = SparseLayer(), torch.Generator().manual_seed(0)
    layer.update(*new_tokens(generator, 2, 4000))
    layer.memory["x"], layer.shared["y"], before = 1, 2, layer.store.num_bytes
    keep = torch.zeros(2, 2, 4000, dtype=torch.bool)
    keep[:, 0, :100], keep[:, 1, :300] = True, True
    layer.evict(keep, layer.store.starts, POLICY)
    assert layer.store.num_bytes < before / 8
    assert not layer.memory
    assert not layer.shared


def test_bad_input():
    layer, generator = SparseLayer(), torch.Generator().manual_seed(0)
    layer.update(*new_tokens(generator, 1, 5))
    for count in (1, -6):
        with pytest.raises(InputError, match=r"tokens_to_remove must be in \[-5, 0\]"):
            layer.crop(count)
    with pytest.raises(InputError, match="offloading must be off"):
        layer.offload()
    with pytest.raises(InputError, match="repeats must be"):
        layer.batch_repeat_interleave(0)
    layer.evict(torch.ones(1, 2, 5, dtype=torch.bool), layer.store.starts, POLICY)
    with pytest.raises(InputError, match="model must carry the eviction policy"):
        layer.update(*new_tokens(generator, 1, 1))


def test_a_cache_from_before_the_policy_goes_on():
    model, ids = model_of("llama"), tokens(40)
    with torch.no_grad():
        dense = model(ids).logits
    cache = DynamicCache(config=model.config)
    follow(model, ids[:, :30], 25, cache)
    apply(model, OracleTopK(num_keys=100, min_length=0))
    torch.testing.assert_close(follow(model, ids[:, 30:], 0, cache), dense[:, 30:], atol=1e-5, rtol=1e-5)
    assert all(isinstance(layer, SparseLayer) for layer in cache.layers)
    remove(model)
    cache.crop(-10)
    torch.testing.assert_close(follow(model, ids[:, 30:], 0, cache), dense[:, 30:], atol=1e-5, rtol=1e-5)


def test_a_compiled_step_is_what_it_is_without():
    model, ids = model_of("llama"), tokens(30)
    apply(model, Quest(num_keys=8, page_size=4, min_length=0, dense_layers=0))
    wanted, cache = follow(model, ids, 24), DynamicCache(config=model.config)
    follow(model, ids[:, :24], 24, cache)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(follow(compiled, ids[:, 24:], 0, cache), wanted[:, 24:], atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "chosen",
    [
        StreamingDecode(num_sinks=1, window_size=5, min_length=0),
        Quest(num_keys=8, page_size=4, min_length=0, dense_layers=0),
        Tidal(num_keys=6, min_length=0, dense_layers=0),
    ],
)
def test_a_sparse_model_drafts_for_the_dense(chosen):
    model, ids = model_of("llama"), tokens(24)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    dense = model.generate(ids, **options)
    drafting = copy.deepcopy(model)
    applied = apply(drafting, chosen)
    assert torch.equal(model.generate(ids, assistant_model=drafting, **options), dense)
    assert sum(applied.density().values()) < 2
    verifying = apply(model, OracleTopK(num_keys=100, min_length=0))
    assert torch.equal(model.generate(ids, assistant_model=drafting, **options), dense)
    verifying.remove()


def contrastive_search(model, input_ids, stopping_criteria, generation_config, **options):
    """Su et al. 2022: of the likeliest tokens the one least like the text so far; for `generate`, which left it out."""
    cache, mask = options["past_key_values"], options.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    count, alpha, rows = generation_config.top_k, generation_config.penalty_alpha, len(input_ids)

    def read(ids, mask):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(ids, past_key_values=cache, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        return out.logits[:, -1], out.hidden_states[-1]

    logits, hidden = read(input_ids, mask)
    done = torch.zeros(rows, dtype=torch.bool)
    while not done.all():
        prob, candidates = logits.softmax(-1).topk(count)
        cache.batch_repeat_interleave(count)
        longer = torch.nn.functional.pad(mask.bool(), (0, 1), value=True)
        logits, new = read(candidates.view(-1, 1), longer.long().repeat_interleave(count, 0))
        alike = torch.cosine_similarity(new, hidden.repeat_interleave(count, 0), dim=-1)
        alike = alike.masked_fill(~mask.bool().repeat_interleave(count, 0), -1).amax(-1).view(rows, count)
        chosen = ((1 - alpha) * prob - alpha * alike).argmax(-1)
        kept = torch.arange(rows) * count + chosen
        cache.batch_select_indices(kept)
        mask, logits, hidden = longer.long(), logits[kept], torch.cat([hidden, new[kept]], dim=1)
        input_ids = torch.cat([input_ids, candidates.gather(1, chosen[:, None])], dim=1)
        done = stopping_criteria(input_ids, None)
    return input_ids


@torch.no_grad()
@pytest.mark.parametrize(
    ("full", "sparse"),
    [
        (Quest(num_keys=1000, min_length=0, dense_layers=0), Quest(num_keys=16, min_length=0, dense_layers=0)),
        (Tova(num_keys=1000), Tova(num_keys=8, every=2)),
        (Tidal(num_keys=1000, min_length=0), Tidal(num_keys=6, min_length=0, dense_layers=0, reselect_layers=[0])),
    ],
    ids=["quest", "tova", "tidal"],
)
def test_contrastive_search_spreads_and_gathers_the_rows_of_a_cache(full, sparse):
    model, ids = model_of("llama"), tokens(30, 2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options = {
        "max_new_tokens": 6, "top_k": 3, "penalty_alpha": 0.6, "pad_token_id": 0,
        "custom_generate": contrastive_search,
    }  # fmt: skip
    dense = model.generate(ids, attention_mask=mask, **options)
    applied = apply(model, full)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), dense)
    applied.remove()
    applied = apply(model, sparse)
    found = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[1:, 7:], attention_mask=mask[1:, 7:], **options)
    assert torch.equal(found[1:, 7:], alone)
    assert sum(applied.density().values()) < 1.5
