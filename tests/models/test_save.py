import json
import resource
import signal
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from paucity.checks import InputError
from paucity.kernels.linear import PackedLinear
from paucity.models import save as save_module
from paucity.models import tensor_files
from paucity.models.load import Loaded, byte_tokenizer, load
from paucity.models.packed import packed_linears
from paucity.models.packed_files import save_packed
from paucity.models.save import save
from paucity.models.sites import find_sites, weight_view
from paucity.weights import pack

IDS = torch.tensor([[5, 9, 3, 40, 22, 7, 1]])


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
    save(loaded, tmp_path / "old", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name for path in (tmp_path / "old").iterdir()} == {"model.safetensors", "paucity.json"}


def test_nothing_is_left_of_a_failed_save(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("gpt2")

    def fail_half_way(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        save(Loaded(model, None, "tiny"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_packed_weights_are_saved_dense(tiny_model, architecture, tmp_path, monkeypatch, shard_bytes):
    if shard_bytes is not None:
        monkeypatch.setattr(tensor_files, "SHARD_BYTES", shard_bytes)
    model = tiny_model(architecture, vocab_size=257)
    for site in find_sites(model, "linear"):
        weight_view(model, site)[..., ::2] = 0
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(Loaded(model, byte_tokenizer(257), "tiny"), tmp_path / "before")
    pack(model)
    held, most = 0, []

    def count(self):
        nonlocal held
        held += 1
        most.append(held)
        weight = PackedLinear.weight.fget(self)
        weakref.finalize(weight, release)
        return weight

    def release():
        nonlocal held
        held -= 1

    monkeypatch.setattr(save_module, "_weight", count)
    save(Loaded(model, byte_tokenizer(257), "tiny"), tmp_path / "m")
    assert max(most) == 1
    assert packed_linears(model)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(value, dense[name]) for name, value in again.state_dict().items())
    if shard_bytes is None:
        names = {path.name for path in (tmp_path / "m").iterdir()}
        assert names == {path.name for path in (tmp_path / "before").iterdir()}
        first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "m"))
        assert list(map(str, sorted(first))) == list(map(str, sorted(second)))
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_a_plain_module_that_is_packed(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].weight.data[:, ::2] = 0
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pack(model)
    save(Loaded(model, None, "Sequential"), tmp_path / "m")
    assert isinstance(model[0], PackedLinear)
    again = load_file(tmp_path / "m" / "model.safetensors")
    assert set(again) == set(dense)
    assert all(torch.equal(again[name], dense[name]) for name in dense)


@pytest.mark.parametrize("kind", ["dense", "zeros of packed", "packed"])
@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_nothing(tiny_model, tmp_path, kind, force):
    """The process may write no file of more than a few kilobytes: to it, the disk is full in the middle of a save."""
    model = tiny_model("llama")
    for site in find_sites(model, "linear"):
        weight_view(model, site)[..., ::2] = 0
    if kind != "dense":
        pack(model)
    write = save_packed if kind == "packed" else save
    if force:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "old").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
        with pytest.raises(OSError, match=r"File too large|could not be written"):
            write(Loaded(model, None, "tiny"), tmp_path / "m", force=force)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.rglob("*")] == (["m", "old"] if force else [])
    write(Loaded(model, None, "tiny"), tmp_path / "m", force=force)
    assert torch.equal(load(tmp_path / "m").model(IDS).logits, model(IDS).logits) == (kind != "zeros of packed")
    assert "old" not in {path.name for path in (tmp_path / "m").iterdir()}


def test_a_move_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "old").write_text("old")
    rename = Path.rename

    def fail_for_new(self, target):
        if self.name.endswith(".tmp"):
            raise OSError("no")
        return rename(self, target)

    for rename_of in (fail_for_new, lambda self, _: fail_for_new(self.with_suffix(".tmp"), _)):
        monkeypatch.setattr(Path, "rename", rename_of)
        with pytest.raises(OSError, match="no"):
            save(Loaded(nn.Linear(1, 1), None, "Linear"), tmp_path / "m", force=True)
        assert [path.name for path in tmp_path.rglob("*")] == ["m", "old"]


@pytest.mark.parametrize("force", [False, True])
def test_a_link_to_a_folder_stays_one(tmp_path, force):
    (tmp_path / "m").mkdir()
    if force:
        (tmp_path / "m" / "old").write_text("old")
    (tmp_path / "link").symlink_to("m")
    save(Loaded(nn.Linear(1, 1), None, "Linear"), tmp_path / "link", force=force)
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "m"]
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"model.safetensors", "paucity.json"}


def test_the_working_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for folder in (".", "..", tmp_path / "a" / "b"):
        with pytest.raises(InputError, match="save: folder must not be the working directory or one above it"):
            save(Loaded(nn.Linear(1, 1), None, "Linear"), folder, force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]
    save(Loaded(nn.Linear(1, 1), None, "Linear"), "c")


def test_a_packed_layer_at_two_paths(tiny_model, tmp_path):
    model = tiny_model("llama")
    for site in find_sites(model, "linear"):
        weight_view(model, site)[..., ::2] = 0
    model.model.layers[1].mlp = model.model.layers[0].mlp
    expected = model(IDS).logits
    pack(model)
    save(Loaded(model, None, "tiny"), tmp_path / "m")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(again(IDS).logits, expected)
