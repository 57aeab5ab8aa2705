import json
import math

import huggingface_hub.constants
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from paucity.checks import InputError
from paucity.measure.data import tiny_stories
from paucity.models.load import byte_tokenizer, load
from paucity.models.packed_files import save_packed
from paucity.models.save import save
from paucity.models.sites import find_sites, weight_view
from paucity.weights import pack


def test_folder_with_and_without_tokenizer(tiny_model, tmp_path):
    model = tiny_model("llama", vocab_size=300)
    model.save_pretrained(tmp_path / "bare")
    loaded = load(tmp_path / "bare")
    ids = torch.tensor([loaded.tokenizer.encode("Ab")])
    assert ids.tolist() == [[256, 65, 98]]
    assert "every byte of a text is one token" in loaded.notes[0]
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert not loaded.model.training

    save(loaded, tmp_path / "full")
    again = load(str(tmp_path / "full"), dtype="bfloat16")
    assert again.notes == []
    assert again.tokenizer.encode("é\n") == [256, 0xC3, 0xA9, 10]
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}


def test_small_vocabulary_has_no_tokenizer(tiny_model, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.tokenizer is None
    with pytest.raises(InputError, match=r"perplexity: model must come with a tokenizer to read text"):
        loaded.need_tokenizer("perplexity")


def test_module_is_taken_as_it_is():
    module, tokenizer = nn.Sequential(nn.Linear(2, 2), nn.Dropout()), byte_tokenizer(257)
    loaded = load(module, tokenizer=tokenizer, dtype="float64")
    assert loaded.model is module
    assert loaded.tokenizer is tokenizer
    assert not module.training
    assert module[0].weight.dtype == torch.float64


@pytest.mark.parametrize("text", ["plain", "tabs\tand\n\n lines ", "héllo wörld", "日本 🙂 \x00\x7f\xad"])
def test_byte_tokenizer_is_the_bytes(text):
    tokenizer = byte_tokenizer(257)
    ids = tokenizer.encode(text)
    assert ids == [256, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 257


def test_a_vocabulary_of_the_bytes_alone_has_no_end_token():
    tokenizer = byte_tokenizer(256)
    assert tokenizer.encode("né") == [*"né".encode()]
    assert (len(tokenizer), tokenizer.bos_token_id) == (256, None)


def test_a_configuration_without_weights_is_random_and_says_so(tiny_model, tmp_path):
    tiny_model("qwen3", vocab_size=300).config.save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    first, second = load(tmp_path), load(str(tmp_path))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert any("without weights: they are random" in note for note in first.notes)
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_bad_sources(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    cases = {
        str(tmp_path / "absent"): "a folder that exists",
        tmp_path / "empty": "a Hugging Face folder with a config.json",
        tmp_path / "broken": "be a readable Hugging Face folder",
        tmp_path / "unknown": "be a readable Hugging Face folder",
        "nobody/no-such-model": "a hub id that can be reached .*offline mode is enabled",
        3: "must be a name, a folder or a module, got int",
    }
    for source, message in cases.items():
        with pytest.raises(InputError, match=message) as error:
            load(source)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"did you mean 'float16'"):
        load(nn.Linear(1, 1), dtype="flot16")
    with pytest.raises(InputError, match=r"load: device must be a device of this machine, got abacus"):
        load(nn.Linear(1, 1), device="abacus")
    with pytest.raises(InputError, match=r"vocab_size must be at least 256, got 255"):
        byte_tokenizer(255)


def test_missing_weights_are_refused(tiny_model, tmp_path):
    model = tiny_model("llama")
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match=r"without 1 of them: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_real_model_reaches_its_known_perplexity(stories260k):
    loaded = load(stories260k)
    assert loaded.notes == []
    text = "Once upon a time, Lily saw a café.\nThe end."
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text), skip_special_tokens=True) == text
    total, count = 0.0, 0
    with torch.inference_mode():
        for story in tiny_stories()[:60]:
            ids = torch.tensor([loaded.tokenizer.encode(story)[:512]])
            logits = loaded.model(ids).logits[0, :-1]
            total += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    assert math.exp(total / count) == pytest.approx(4.15, rel=0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_leaves_the_rotary_frequencies_exact(tiny_model, tmp_path, dtype):
    model, ids = tiny_model("llama", vocab_size=300), torch.arange(3, 120)[None]
    for site in find_sites(model, "linear"):
        weight_view(model, site)[..., ::2] = 0
    model.save_pretrained(tmp_path / "m")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=getattr(torch, dtype))
    loaded = load(tmp_path / "m", dtype=dtype)
    assert {name: b.dtype for name, b in own.named_buffers()} == {
        name: b.dtype for name, b in loaded.model.named_buffers()
    }
    with torch.no_grad():
        expected = own(ids).logits
        assert torch.equal(loaded.model(ids).logits, expected)
        assert torch.equal(load(model, dtype=dtype).model(ids).logits, expected)
        pack(loaded)
        packed = loaded.model(ids).logits
        save_packed(loaded, tmp_path / "packed")
        assert torch.equal(load(tmp_path / "packed").model(ids).logits, packed)
