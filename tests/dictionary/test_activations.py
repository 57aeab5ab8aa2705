"""Live and cached activations: the same rows as one forward at a time, resumed to the byte, refused when broken."""

import itertools
import json

import pytest
import torch

from paucity.checks import InputError
from paucity.dictionary import cache
from paucity.dictionary.cache import cached_source, read_facts, write_cache
from paucity.dictionary.fast import concatenated, conversation_ids, fast_source
from paucity.dictionary.live import Columns, Harvester, live_source
from paucity.models.harvest import harvest
from paucity.models.load import Loaded, byte_tokenizer
from paucity.models.places import find_hook
from paucity.models.vision import ViT

HOOKS = ["residual.0", "heads.1"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(1)
    items = [torch.randint(3, 64, (1, size), generator=generator) for size in (6, 9, 4, 12, 7)]
    items[0][0, 0] = items[3][0, 5] = 1  # a special token
    return items


def rows_of(source, count, size=5, start=0):
    return torch.cat(list(itertools.islice(source.batches(size, start=start), count)))


def as_set(rows):
    return {tuple(row) for row in rows.tolist()}


def test_a_live_stream_holds_what_forwards_give(tiny_model, texts):
    model = tiny_model("llama")
    source = live_source(model, HOOKS, texts, skip_ids=(1,), capacity=10)
    assert source.input_size == 64
    assert source.counts == [5, 9, 4, 11, 7]
    wanted = []
    for ids in texts:
        parts = [harvest(model, [find_hook(model, name)], ids, skip_ids=(1,))[name] for name in HOOKS]
        wanted.append(torch.cat(parts, 1))
    assert as_set(rows_of(source, 24)) <= as_set(torch.cat(wanted))
    assert len(as_set(rows_of(source, 40))) == 36
    assert torch.equal(rows_of(source, 3, start=4), rows_of(source, 7)[20:])
    second = Columns(source, 32, 64)
    assert torch.equal(rows_of(second, 3), rows_of(source, 3)[:, 32:])


def test_pictures_are_a_source(tiny_model):
    model = ViT(dim=16, depth=2, heads=2).eval()
    source = live_source(model, "patches.1", [torch.randn(2, 1, 28, 28), torch.randn(3, 1, 28, 28)], capacity=64)
    assert source.counts == [98, 147]
    assert source.sample(5).shape == (5, 16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cache_gives_what_was_written(tiny_model, texts, tmp_path, dtype):
    model = tiny_model("llama")
    harvester = Harvester(model, HOOKS, texts, skip_ids=(1,))
    told = []
    facts = write_cache(
        tmp_path / "c",
        harvester,
        model="tiny",
        texts="random",
        dtype=dtype,
        shard_rows=12,
        on_progress=lambda *a: told.append(a),
    )
    assert facts == read_facts(tmp_path / "c")
    assert [shard.counts for shard in facts.shards] == [(5, 9), (4, 11), (7,)]
    assert facts.hooks == {"residual.0": 32, "heads.1": 32}
    assert facts.num_rows == 36
    assert told[-1] == (36, 36, "shard-00002.safetensors")
    live = rows_of(live_source(model, HOOKS, texts, skip_ids=(1,), capacity=10, seed=2), 20)
    held = rows_of(cached_source(tmp_path / "c", capacity=10, seed=2), 20)
    assert held.dtype == cache.DTYPES[dtype]
    assert torch.equal(held, live.to(held.dtype))  # the same mixing, from disk
    one = rows_of(cached_source(tmp_path / "c", "heads.1", capacity=10, seed=2), 20)
    assert torch.equal(one, held[:, 32:])
    with cache.safe_open(tmp_path / "c" / "shard-00001.safetensors", "pt") as file:
        ids, places = file.get_tensor("tokens/ids"), file.get_tensor("tokens/places")
    assert ids.tolist() == [t for t in [*texts[2][0].tolist(), *texts[3][0].tolist()] if t != 1]
    assert places.tolist() == [0, 1, 2, 3, *[p for p in range(12) if p != 5]]


def test_a_cache_goes_on_after_a_kill_in_the_middle_of_a_write(tiny_model, texts, tmp_path, monkeypatch):
    model = tiny_model("llama")
    harvester = Harvester(model, HOOKS, texts)
    options = {"model": "tiny", "texts": "random", "shard_rows": 12}
    write_cache(tmp_path / "whole", harvester, **options)
    save, written = cache.save_file, []

    def killed(tensors, path):
        if len(written) == 1:
            (tmp_path / "c.partial" / "left.tmp").write_bytes(b"half a shard")  # a kill cleans nothing up
            raise KeyboardInterrupt
        written.append(path)
        save(tensors, path)

    monkeypatch.setattr(cache, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "c", harvester, **options)
    monkeypatch.setattr(cache, "save_file", save)
    assert not (tmp_path / "c").exists()
    assert (tmp_path / "c.partial" / "shard-00000.safetensors").is_file()
    with pytest.raises(InputError, match=r"out must hold no unfinished run \(--resume continues it"):
        write_cache(tmp_path / "c", harvester, **options)
    with pytest.raises(InputError, match="resume must continue a run of the same plan"):
        write_cache(tmp_path / "c", Harvester(model, HOOKS, texts[:3]), **options, resume=True)
    runs = []
    monkeypatch.setattr(harvester, "parts", lambda item: runs.append(item) or Harvester.parts(harvester, item))
    write_cache(tmp_path / "c", harvester, **options, resume=True)
    assert runs == [2, 3, 4]  # the first shard is not made again
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == names
    for name in names:
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_goes_on_is_of_one_model_and_one_plan(tiny_model, texts, tmp_path, monkeypatch):
    model = tiny_model("llama")
    harvester, save = Harvester(model, HOOKS, texts), cache.save_file
    options = {"model": "tiny", "texts": "random", "shard_rows": 12}

    def killed(tensors, path):
        if path.name.startswith("shard-00002"):
            raise KeyboardInterrupt
        save(tensors, path)

    monkeypatch.setattr(cache, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "c", harvester, **options)
    monkeypatch.setattr(cache, "save_file", save)
    other = r"resume must continue a run of the same plan, got another in"
    with pytest.raises(InputError, match=other):
        write_cache(tmp_path / "c", harvester, **options | {"shard_rows": 20}, resume=True)
    weight = model.model.layers[1].mlp.down_proj.weight  # one number of a model of the same name
    with torch.no_grad():
        kept, weight[3, 5] = float(weight[3, 5]), 0.25
    with pytest.raises(InputError, match=other):
        write_cache(tmp_path / "c", harvester, **options, resume=True)
    with torch.no_grad():
        weight[3, 5] = kept
    shard = tmp_path / "c.partial" / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])  # said to be done, but not on disk: power was lost
    facts = write_cache(tmp_path / "c", harvester, **options, resume=True)
    assert read_facts(tmp_path / "c") == facts
    assert (tmp_path / "c" / shard.name).read_bytes() == whole
    assert write_cache(tmp_path / "c", harvester, **options, resume=True) == facts  # complete
    with pytest.raises(InputError, match=other):
        write_cache(tmp_path / "c", Harvester(model, HOOKS, texts[:3]), **options, resume=True)


def test_a_source_goes_on_with_the_cache_that_it_opened(tiny_model, texts, tmp_path):
    model, options = tiny_model("llama"), {"model": "tiny", "texts": "random", "shard_rows": 5}
    write_cache(tmp_path / "c", Harvester(model, HOOKS, texts), **options)
    wanted = rows_of(cached_source(tmp_path / "c", capacity=4), 8)
    source = cached_source(tmp_path / "c", capacity=4)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(-1)
    write_cache(tmp_path / "c", Harvester(model, HOOKS, texts), **options, force=True)
    assert torch.equal(rows_of(source, 8), wanted)


def test_a_broken_cache_is_refused(tiny_model, texts, tmp_path):
    write_cache(
        tmp_path / "c", Harvester(tiny_model("llama"), HOOKS, texts), model="tiny", texts="random", shard_rows=12
    )
    with pytest.raises(InputError, match=r"hooks must be one of heads.1, residual.0, got heads.0"):
        cached_source(tmp_path / "c", "heads.0")
    with pytest.raises(InputError, match="folder must hold activations"):
        cached_source(tmp_path)
    shard = tmp_path / "c" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"shards must be there and whole, .*got shard-00001"):
        cached_source(tmp_path / "c")
    shard.unlink()
    with pytest.raises(InputError, match=r"shards must be there and whole, .*got shard-00001"):
        cached_source(tmp_path / "c")
    facts = json.loads((tmp_path / "c" / "activations.json").read_text()) | {"surprise": 1}
    (tmp_path / "c" / "activations.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"activations.json must be what paucity wrote"):
        cached_source(tmp_path / "c")


def test_bad_activations_and_items_are_refused(tiny_model, texts, tmp_path):
    model = tiny_model("llama")
    with pytest.raises(InputError, match="items must hold at least one, got none"):
        live_source(model, "residual.0", [])
    with pytest.raises(InputError, match="hooks must be places, each once"):
        live_source(model, ["residual.0", "residual.0"], texts)
    with pytest.raises(InputError, match="items must hold a token that is neither padding nor special"):
        live_source(model, "residual.0", [torch.full((1, 4), 1)], skip_ids=(1,))
    pictures = [torch.randn(2, 1, 28, 28)]
    differ = r"hooks must give the same number of rows, got {'patches.0': 98, 'head': 2} in item 0"
    with pytest.raises(InputError, match=differ):
        Harvester(ViT(dim=16, depth=2, heads=2).eval(), ["patches.0", "head"], pictures)
    with pytest.raises(InputError, match=r"token ids from 0 to 63, got 64"):
        live_source(model, "residual.0", [torch.tensor([[64]])])
    with pytest.raises(InputError, match=r"the nearest are residual.0"):
        live_source(model, "residuel.0", texts)
    with pytest.raises(InputError, match="dtype must be one of bfloat16, float32, got int8"):
        write_cache(tmp_path / "c", Harvester(model, HOOKS, texts), model="tiny", texts="", dtype="int8")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"activations must be finite, got NaN or infinity in item"):
        next(live_source(model, "residual.0", texts).batches(3))
    with pytest.raises(InputError, match=r"activations must be finite, got NaN or infinity in item 0 at residual.0"):
        write_cache(tmp_path / "d", Harvester(model, ["residual.0"], texts), model="tiny", texts="")


def test_conversations_stay_alone_and_blocks_do_not(tiny_model):
    tokenizer = byte_tokenizer(300)
    chats = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]] * 2
    items = conversation_ids(tokenizer, chats, template=TEMPLATE, max_length=20)
    assert [tokenizer.decode(ids[0]) for ids in items] == ["<user>Hi\n<assistant>"] * 2
    blocks = concatenated(items, 15)
    assert [block.shape for block in blocks] == [(1, 15)] * 2
    assert torch.equal(torch.cat(blocks, 1), torch.cat(items, 1)[:, :30])
    model = tiny_model("llama", vocab_size=300)
    source = fast_source(Loaded(model, tokenizer, "tiny"), "residual.1", chats, template=TEMPLATE)
    assert source.counts == [25, 25]
    alone = harvest(model, [find_hook(model, "residual.1")], conversation_ids(tokenizer, chats, template=TEMPLATE)[1])
    assert as_set(rows_of(source, 12)) == as_set(alone["residual.1"])


def test_bad_conversations():
    tokenizer = byte_tokenizer(300)
    with pytest.raises(InputError, match="tokenizer must have a chat template"):
        conversation_ids(tokenizer, [[{"role": "user", "content": "Hi"}]])
    with pytest.raises(InputError, match="conversations must hold at least one"):
        conversation_ids(tokenizer, [], template=TEMPLATE)
    with pytest.raises(InputError, match="messages with a role and content, got number 0"):
        conversation_ids(tokenizer, [[{"role": "user"}]], template=TEMPLATE)
    chats = [[{"role": "user", "content": "Hi"}], [{"role": "other", "content": "Hi"}]]
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}a"
    with pytest.raises(InputError, match=r"fit the chat template, got number 1: roles must alternate"):
        conversation_ids(tokenizer, chats, template=strict)
    with pytest.raises(InputError, match=r"fit the chat template, got number 0: "):
        conversation_ids(tokenizer, chats, template="{% if %}")
    with pytest.raises(InputError, match="items must hold at least 9 tokens, got 4"):
        concatenated([torch.ones(1, 4, dtype=torch.int64)], 9)
