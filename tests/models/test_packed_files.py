"""Packed models on disk: they come back onto the kernels with equal logits, and what is damaged is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paucity
from paucity.checks import InputError
from paucity.models import tensor_files
from paucity.models.load import PACKED_INDEX, Loaded, byte_tokenizer
from paucity.models.packed import packed_linears
from paucity.models.packed_files import load_packed, save_packed
from paucity.models.save import save
from paucity.models.sites import find_sites, weight_view
from paucity.ops.formats import PackedGroups
from paucity.weights import pack

IDS = torch.tensor([[5, 9, 3, 40, 22, 7, 1]])


def sparse(model):
    for number, site in enumerate(find_sites(model, "linear")):
        view = weight_view(model, site)
        if number % 3 == 0:
            view[..., ::2] = 0
        elif number % 3 == 1:
            view[..., : view.shape[-2] // 2, :] = 0
        else:
            view.masked_fill_(torch.rand(view.shape) < 0.7, 0)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("shard_bytes", [None, 10_000])
def test_round_trip(tiny_model, architecture, tmp_path, monkeypatch, shard_bytes):
    if shard_bytes is not None:
        monkeypatch.setattr(tensor_files, "SHARD_BYTES", shard_bytes)
    model = sparse(tiny_model(architecture, vocab_size=300))
    for parameter in model.parameters():  # Module.bfloat16 would round the rotary frequencies, which are never saved
        parameter.data = parameter.data.bfloat16()
    model.generation_config.max_length = 33
    pack(model)
    saved = save_packed(Loaded(model, byte_tokenizer(300), "tiny"), tmp_path / "m")
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert saved.num_bytes == sum(file.stat().st_size for file in files)
    assert (len(files) > 1) == (shard_bytes is not None)
    save(Loaded(model, byte_tokenizer(300), "tiny"), tmp_path / "dense")
    dense = sum(file.stat().st_size for file in (tmp_path / "dense").glob("*.safetensors"))
    assert saved.dense_bytes == pytest.approx(dense, rel=0.1)
    assert saved.num_bytes < saved.dense_bytes
    for again in (paucity.load(tmp_path / "m"), load_packed(str(tmp_path / "m"))):
        assert torch.equal(logits(again.model), logits(model))
        assert {p: x.format for p, x in packed_linears(again.model).items()} == {
            path: layer.format for path, layer in packed_linears(model).items()
        }
        assert again.tokenizer.encode("a") == [256, 97]
        assert not again.notes
        assert not again.model.training
        assert again.model.generation_config.max_length == 33
    state = again.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    tied = [parameter is again.model.get_input_embeddings().weight for parameter in again.model.parameters()]
    assert sum(tied) == 1
    assert paucity.load(tmp_path / "m", dtype="float32").model(IDS).logits.dtype == torch.float32
    unpacked = paucity.load(tmp_path / "dense").model
    torch.testing.assert_close(logits(unpacked), logits(model), atol=0.1, rtol=0.05)


def test_any_module_and_groups(tmp_path):
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 32, bias=False)).eval()
    stored = PackedGroups.pack(torch.randn(16, 32) * (torch.rand(16, 2) < 0.5).repeat_interleave(16, 1))
    model[0].weight.data = stored.unpack()
    model[2].weight.data[:, ::2] = 0
    pack(model, weights={"0.weight": stored})
    save_packed(Loaded(model, None, "x"), tmp_path / "m")
    x = torch.randn(3, 32)
    fresh = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 32, bias=False))
    again = load_packed(tmp_path / "m", fresh)
    assert again.model is fresh
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(InputError, match="be of a Hugging Face model; for another one pass `model`, got Sequential"):
        load_packed(tmp_path / "m")
    for other, message in (
        (nn.ModuleList([nn.Linear(32, 16)]), "model must be a Sequential, as .* says, got ModuleList"),
        (nn.Sequential(nn.Linear(32, 16)), r"with a packed 2\."),
        (nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 31)), r"\(\[31, 16\]\), got \[32, 16\]"),
        (nn.Sequential(nn.Linear(32, 16), nn.Identity(), nn.Linear(16, 32, bias=False)), "no place in it"),
        (nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 32)), "2.bias, which it lacks"),
        (nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(8), nn.Linear(16, 32, bias=False)), r"instead of \[8\]"),
    ):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(InputError, match=message):
            load_packed(tmp_path / "m", other)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_what_is_damaged_is_refused(tiny_model, tmp_path):
    model = sparse(tiny_model("llama"))
    with pytest.raises(InputError, match="save_packed: loaded must hold packed layers"):
        save_packed(Loaded(model, None, "tiny"), tmp_path / "m")
    with pytest.raises(InputError, match=r"load_packed: folder must be one that save_packed wrote .*, got .*absent"):
        load_packed(tmp_path / "absent")
    pack(model)
    folder = tmp_path / "m"
    save_packed(Loaded(model, None, "tiny"), folder)
    with pytest.raises(InputError, match="save_packed: folder must be absent or empty"):
        save_packed(Loaded(model, None, "tiny"), folder)
    save_packed(Loaded(model, None, "tiny"), folder, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    index = json.loads((folder / PACKED_INDEX).read_text())
    whole = (folder / "packed.safetensors").read_bytes()
    tensors = load_file(folder / "packed.safetensors")
    nm = next(name.removesuffix(".nm") for name in tensors if name.endswith(".nm"))
    spoiled = tensors | {f"{nm}.bits": torch.zeros_like(tensors[f"{nm}.bits"])}

    def write(content):
        (folder / "packed.safetensors").write_bytes(content)
        index["files"]["packed.safetensors"] = len(content)
        (folder / PACKED_INDEX).write_text(json.dumps(index))

    def refused(message):
        with pytest.raises(InputError, match=message) as error:
            paucity.load(folder)
        assert "\n" not in str(error.value)

    (folder / "packed.safetensors").write_bytes(whole[:-100])
    refused(r"folder must be whole, got .*m \(packed.safetensors with .* bytes instead of")
    write(whole[:-100])
    refused(r"folder must be whole, got .*m \(packed.safetensors: ")
    write(b"\xff" * 64 + whole[64:])
    refused(r"folder must be whole, got .*m \(packed.safetensors: ")
    save_file(spoiled, folder / "packed.safetensors")
    write((folder / "packed.safetensors").read_bytes())
    refused(rf"whole, got .*{nm}: PackedNM.from_tensors: bits must have 1 set in every group of 2")
    (folder / "packed.safetensors").unlink()
    refused(r"whole, got .*packed.safetensors, which is not there")
    write(whole)
    for change, message in (
        ({"version": 2}, "have version 1 of the format, got version 2"),
        ({"format": "other"}, "be one that save_packed wrote"),
        ({"layers": {}}, "be one that save_packed wrote"),
        ({"architecture": "GPT2LMHeadModel"}, "whole|weights of the architecture"),
        ({"architecture": "os"}, "be of a Hugging Face model"),
        ({"files": {"../m/packed.safetensors": len(whole)}}, "which is not there"),
    ):
        (folder / PACKED_INDEX).write_text(json.dumps(index | change))
        refused(message)
    (folder / PACKED_INDEX).write_text("{")
    refused("be one that save_packed wrote")
    write(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    refused(r"hold weights of the architecture \(\[.*40.*\]\), got")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    refused("layers.1")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))
    refused("folder must be whole")


def test_what_the_architecture_ties_comes_back_apart(tiny_model, tmp_path):
    model = sparse(tiny_model("llama", vocab_size=300))
    model.config.tie_word_embeddings = True
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach() * 2)
    pack(model)
    save_packed(Loaded(model, None, "tiny"), tmp_path / "m")
    again = paucity.load(tmp_path / "m").model
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


class Twice(nn.Module):
    """One layer, or two."""

    def __init__(self, shared=True):
        super().__init__()
        self.a = nn.Linear(32, 32)
        self.b = self.a if shared else nn.Linear(32, 32)
        self.c = nn.Linear(32, 32)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_a_module_at_two_paths(tiny_model, tmp_path):
    model, x = Twice(), torch.randn(3, 32)
    model.a.weight.data[:, ::2] = 0
    pack(model)
    save_packed(Loaded(model, None, "x"), tmp_path / "m")
    for fresh in (Twice(), Twice(shared=False)):
        assert torch.equal(load_packed(tmp_path / "m", fresh).model(x), model(x))
    apart = Twice(shared=False)
    apart.c.weight.data[:, ::2] = 0
    pack(apart)
    save_packed(Loaded(apart, None, "x"), tmp_path / "apart")
    with pytest.raises(InputError, match=r"with b\.weight apart from a\.weight, with which it is one module there"):
        load_packed(tmp_path / "apart", Twice())
    index = json.loads((tmp_path / "m" / PACKED_INDEX).read_text())
    (tmp_path / "m" / PACKED_INDEX).write_text(json.dumps(index | {"shared": {"b": "d"}}))
    with pytest.raises(InputError, match=r"be whole, got .*\(b shared with d, which it lacks\)"):
        load_packed(tmp_path / "m", Twice())

    llama = sparse(tiny_model("llama"))
    llama.model.layers[1].mlp = llama.model.layers[0].mlp
    llama.model.norm.weight = llama.model.layers[1].input_layernorm.weight
    pack(llama)
    save_packed(Loaded(llama, None, "tiny"), tmp_path / "llama")
    assert torch.equal(logits(paucity.load(tmp_path / "llama").model), logits(llama))
