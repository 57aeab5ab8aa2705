import json

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from paucity.checks import InputError
from paucity.models.load import Loaded, byte_tokenizer, load
from paucity.models.save import save
from paucity.models.sites import find_sites, weight_view


def test_round_trip(tiny_model, architecture, tmp_path):
    model = tiny_model(architecture)
    for site in find_sites(model, "linear"):
        weight_view(model, site)[..., ::2, :] = 0
    assert save(Loaded(model, None, "tiny"), tmp_path / "a" / "b") == tmp_path / "a" / "b"
    again = load(tmp_path / "a" / "b").model
    ids = torch.randint(3, 64, (1, 20))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    for site in find_sites(again, "linear"):
        assert (weight_view(again, site)[..., ::2, :] == 0).all()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_folder_is_ordinary(tiny_model, tmp_path):
    model = tiny_model("llama", vocab_size=257).bfloat16()
    AttentionInterface.register("paucity_test", sdpa_attention_forward)
    model.set_attn_implementation("paucity_test")
    model.config.sparsity_config = {"format": "dense"}
    save(Loaded(model, byte_tokenizer(257), "tiny"), tmp_path / "m", extra={"sparsity": 0.5})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "paucity" not in json.dumps(config)
    assert "sparsity_config" not in config
    assert json.loads((tmp_path / "m" / "paucity.json").read_text())["extra"] == {"sparsity": 0.5}
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert again.dtype == torch.bfloat16
    assert again.config._attn_implementation == "sdpa"
    assert AutoTokenizer.from_pretrained(tmp_path / "m").encode("a") == [256, 97]


def test_plain_module(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    (tmp_path / "m").mkdir()  # an empty folder is fine
    save(Loaded(model, None, "Sequential"), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "paucity.json").read_text())["class"] == "Sequential"
    assert "0.weight" in load_file(tmp_path / "m" / "model.safetensors")
    again = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    again[1].weight = again[0].weight
    load_model(again, tmp_path / "m" / "model.safetensors")
    assert torch.equal(again[1].weight, model[1].weight)


def test_existing_folder_is_refused_and_kept(tmp_path):
    loaded = Loaded(nn.Linear(1, 1), None, "Linear")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("old")
    with pytest.raises(InputError, match=r"save: folder must be absent or empty, got .*old"):
        save(loaded, tmp_path / "old")
    with pytest.raises(InputError, match=r"save: folder must be absent or an empty folder, got the file"):
        save(loaded, tmp_path / "old" / "file")
    with pytest.raises(InputError, match=r"save: extra must be JSON-able"):
        save(loaded, tmp_path / "new", extra={"tensor": torch.ones(1)})
    assert (tmp_path / "old" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_nothing_is_left_of_a_failed_save(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("gpt2")

    def fail_half_way(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        save(Loaded(model, None, "tiny"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
