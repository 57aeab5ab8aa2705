"""Dictionaries on disk: our own layout bit by bit, those of sparsify and dictionary_learning, and what is refused."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from paucity.checks import InputError
from paucity.dictionary import files, tensors
from paucity.dictionary.abs_topk import AbsTopK
from paucity.dictionary.batch_topk import BatchTopK
from paucity.dictionary.files import load_dictionary, read_facts, save_dictionary
from paucity.dictionary.gated import Gated
from paucity.dictionary.itda import ITDA
from paucity.dictionary.jumprelu import JumpReLU
from paucity.dictionary.matching_pursuit import MatchingPursuit
from paucity.dictionary.matryoshka import matryoshka_sae
from paucity.dictionary.mutual_choice import MutualChoice
from paucity.dictionary.relu import ReLU
from paucity.dictionary.sae import SparseAutoencoder
from paucity.dictionary.saelens import save_saelens
from paucity.dictionary.top_afa import TopAFA
from paucity.dictionary.topk import TopK

D, M, K = 6, 20, 3
MADE = {
    "relu": lambda: SparseAutoencoder(D, M, ReLU(0.25, warmup=0.5)),
    "topk": lambda: SparseAutoencoder(D, M, TopK(K), centre=False, k_aux=2, silent_after=7, auxiliary=0.5, seed=4),
    "transcoder": lambda: SparseAutoencoder(D, M, AbsTopK(K), output_size=9),
    "gated": lambda: SparseAutoencoder(D, M, Gated(2.0)),
    "jumprelu": lambda: SparseAutoencoder(D, M, JumpReLU(0.1, bandwidth=0.2)),
    "batch_topk": lambda: SparseAutoencoder(D, M, BatchTopK(K, forget=0.5)),
    "matryoshka": lambda: matryoshka_sae(D, M, k=K, prefixes=(2, 7)),
    "mutual_choice": lambda: SparseAutoencoder(D, M, MutualChoice(K)),
    "top_afa": lambda: SparseAutoencoder(D, M, TopAFA()),
    "pursuit": lambda: MatchingPursuit(D, M, K, tolerance=0.25, signed=True),
}


def trained(name, dtype=torch.float32):
    dictionary = MADE[name]()
    x = torch.randn(100, dictionary.input_size, generator=torch.Generator().manual_seed(0))
    if getattr(dictionary, "output_size", D) == D:
        dictionary.fit(x, num_tokens=100, batch_size=20)
    return dictionary.to(dtype).eval()


def inputs():
    return torch.randn(30, D, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MADE)
def test_a_dictionary_comes_back_bit_by_bit(tmp_path, name, dtype):
    dictionary = trained(name, dtype)
    save_dictionary(dictionary, tmp_path / "deep" / "one", facts={"hook": "layers.1"})
    found = load_dictionary(tmp_path / "deep" / "one")
    assert type(found) is type(dictionary)
    assert found.settings() == dictionary.settings()
    assert not found.training
    ours, theirs = dictionary.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert torch.equal(found(inputs()), dictionary(inputs()))
    assert torch.equal(found.encode(inputs()).to_dense(), dictionary.encode(inputs()).to_dense())
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in dictionary.parameters()]
    assert read_facts(tmp_path / "deep" / "one") == {"hook": "layers.1"}


def test_atoms_that_fit_has_found_come_back(tmp_path):
    dictionary = ITDA(D, 15, K, threshold=0.1)
    count = dictionary.fit(torch.randn(40, D, generator=torch.Generator().manual_seed(0)))
    save_dictionary(dictionary, tmp_path)
    found = load_dictionary(tmp_path)
    assert found.dict_size == count > 0
    assert torch.equal(found.atoms, dictionary.atoms)
    assert torch.equal(found.origins, dictionary.origins)
    assert torch.equal(found(inputs()), dictionary(inputs()))


def test_one_that_is_read_can_be_trained_on(tmp_path):
    save_dictionary(trained("batch_topk"), tmp_path)
    found = load_dictionary(tmp_path)
    before = found.decoder.clone()
    found.fit(torch.randn(100, D), num_tokens=40, batch_size=20)
    assert not torch.equal(found.decoder, before)


def test_a_kill_leaves_the_one_before(tmp_path, monkeypatch):
    save_dictionary(trained("topk"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def failing(held, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(tensors, "save_file", failing)
    with pytest.raises(OSError, match="disk full"):
        save_dictionary(trained("gated"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def changed(folder, **changes):
    record = json.loads((folder / files.SETTINGS).read_text())
    record = record | {name: value for name, value in changes.items() if name in record}
    record["settings"] |= {name: value for name, value in changes.items() if name in record["settings"]}
    (folder / files.SETTINGS).write_text(json.dumps(record))
    stored = load_file(folder / files.WEIGHTS)
    save_file(stored, folder / files.WEIGHTS, {"settings": json.dumps(record, sort_keys=True)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dict_size": M + 1}, r"source must hold encoder of shape \[21, 6\], as its settings say, got \[20, 6\]"),
        ({"rule": {"name": "gated:Gated"}}, r"got missing: rule.log_gain, rule.magnitude_bias; unknown: none"),
        ({"rule": {"name": "topk:TopK", "k": 99}}, r"TopK: k must be in \[1, 20\], got 99"),
        ({"rule": {"name": "topk:TopK", "l": 1}}, r"source must hold the settings of TopK, got .*argument 'l'"),
        ({"rule": {"name": "os:system"}}, r"source must name a Rule of this package, got os:system"),
        ({"rule": {"name": "sae:SparseAutoencoder"}}, r"name a Rule of this package, got sae:SparseAutoencoder"),
        ({"class": "subprocess:run"}, r"name a Dictionary of this package, got subprocess:run"),
        ({"class": "trainer:Adam"}, r"name a Dictionary of this package, got trainer:Adam"),
        ({"class": 3}, r"name a Dictionary of this package, got 3"),
        ({"settings": [1]}, r"source must hold the settings of SparseAutoencoder, got \[1\]"),
        ({"format": 2}, r"format of the source must be 1, got 2"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, changes, message):
    save_dictionary(trained("topk"), tmp_path)
    if "settings" in changes:
        record = json.loads((tmp_path / files.SETTINGS).read_text()) | changes
        (tmp_path / files.SETTINGS).write_text(json.dumps(record))
    else:
        changed(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        load_dictionary(tmp_path)


def test_files_that_are_not_whole_are_refused(tmp_path):
    save_dictionary(trained("topk"), tmp_path / "one")
    save_dictionary(trained("gated"), tmp_path / "two")
    weights = tmp_path / "one" / files.WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(InputError, match=r"hold a whole safetensors file dictionary.safetensors, got"):
        load_dictionary(tmp_path / "one")
    weights.write_bytes((tmp_path / "two" / files.WEIGHTS).read_bytes())
    with pytest.raises(InputError, match=r"dictionary.json and dictionary.safetensors of one dictionary, got of two"):
        load_dictionary(tmp_path / "one")
    weights.write_bytes(whole)
    (tmp_path / "one" / files.SETTINGS).write_text("{")
    with pytest.raises(InputError, match=r"hold a JSON object in dictionary.json, got Expecting"):
        load_dictionary(tmp_path / "one")
    weights.unlink()
    with pytest.raises(
        InputError, match=r"must hold dictionary.json and dictionary.safetensors; or cfg.json and .*got"
    ):
        load_dictionary(tmp_path / "one")
    with pytest.raises(InputError, match=r"must be a folder with a dictionary, or owner/name on the hub, got nowhere"):
        load_dictionary("nowhere")


def test_pickles_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("was unpickled",))

    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(Trap()))
    for source in (tmp_path, tmp_path / "ae.pt"):
        with pytest.raises(InputError, match=r"be safetensors: a pickle can run any code.*weights_only=True.*ae.pt"):
            load_dictionary(source)


def test_the_advice_on_pickles_works(tmp_path, monkeypatch):
    stored = learned("AutoEncoder")
    torch.save(stored, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    monkeypatch.chdir(tmp_path)
    exec(files._CONVERT, {})
    codes, _ = by_formula("AutoEncoder", stored, inputs())
    torch.testing.assert_close(load_dictionary(tmp_path).encode(inputs()).to_dense(), codes, rtol=1e-4, atol=1e-5)


def test_the_hub_is_asked_for_what_is_no_folder(tmp_path, monkeypatch):
    save_dictionary(trained("topk"), tmp_path / "layers.3" / "mlp")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(files, "snapshot_download", download)
    assert isinstance(load_dictionary("someone/some.saes/layers.3/mlp"), SparseAutoencoder)
    assert asked[0][0] == "someone/some.saes"
    assert "layers.3/mlp/dictionary.safetensors" in asked[0][1]
    assert not any("*" in pattern or pattern.endswith(".pt") for pattern in asked[0][1])
    listed = ["layers.3/mlp/sae.safetensors", "layers.9/ae.pt", "README.md"]
    monkeypatch.setattr(files, "list_repo_files", lambda name: listed)
    with pytest.raises(InputError, match=r"there is someone/some\.saes/layers.3/mlp"):
        load_dictionary("someone/some.saes")
    with pytest.raises(InputError, match=r"be safetensors: a pickle .*got someone/some.saes/layers.9/ae.pt"):
        load_dictionary("someone/some.saes/layers.9")

    def unreachable(name, allow_patterns):
        raise OSError("no network\nat all")

    monkeypatch.setattr(files, "snapshot_download", unreachable)
    with pytest.raises(InputError, match=r"a repository of the hub that can be reached, got a/b: no network\."):
        load_dictionary("a/b")


def learned(kind):
    """A state of dictionary_learning, by the names and shapes of its classes."""
    torch.manual_seed(0)
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        stored = {"W_enc": torch.randn(D, M), "b_enc": torch.randn(M), "W_dec": torch.randn(M, D)}
        stored |= {"b_dec": torch.randn(D), "threshold": torch.rand(M) if "Jump" in kind else torch.tensor(0.7)}
        more = {"k": torch.tensor(K, dtype=torch.int32), "group_sizes": torch.tensor([4, 6, M - 10])}
        return stored | (more if "TopK" in kind else {})
    stored = {"encoder.weight": torch.randn(M, D), "decoder.weight": torch.randn(D, M)}
    if kind == "GatedAutoEncoder":
        biases = {name: torch.randn(M) for name in ("gate_bias", "mag_bias", "r_mag")}
        return stored | biases | {"decoder_bias": torch.randn(D)}
    stored["encoder.bias"] = torch.randn(M)
    stored[{"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")] = torch.randn(D)
    if "TopK" in kind:
        stored |= {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    return stored


def by_formula(kind, stored, x):
    offset = next(stored[name] for name in ("bias", "decoder.bias", "b_dec", "decoder_bias") if name in stored)
    centred = x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - offset
    linear = centred @ (stored["W_enc"] if "W_enc" in stored else stored["encoder.weight"].T)
    if kind == "GatedAutoEncoder":
        open_ = linear + stored["gate_bias"] > 0
        codes = open_ * (stored["r_mag"].exp() * linear + stored["mag_bias"]).relu()
    else:
        codes = (linear + stored.get("encoder.bias", stored.get("b_enc"))).relu()
        if kind == "AutoEncoderTopK":
            codes = torch.zeros_like(codes).scatter(1, codes.topk(K).indices, codes.topk(K).values)
        elif "threshold" in stored:
            codes = codes * (codes > stored["threshold"])
    return codes, codes @ (stored["W_dec"] if "W_dec" in stored else stored["decoder.weight"].T) + offset


LEARNED = (
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
)


@pytest.mark.parametrize("kind", LEARNED)
def test_dictionary_learning_is_read_by_its_formulas(tmp_path, kind):
    stored, x = learned(kind), inputs()
    trainer = {"dict_class": kind} | ({"k": K} if "TopK" in kind else {})
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    save_file(stored, tmp_path / "ae.safetensors")
    sae = load_dictionary(tmp_path)
    codes, out = by_formula(kind, stored, x)
    torch.testing.assert_close(sae.encode(x).to_dense(), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), out, rtol=1e-4, atol=1e-4)
    assert sae.prefixes == ((4, 10) if "Matryoshka" in kind else ())
    # From layout to layout no number changes.
    save_dictionary(sae, tmp_path / "ours")
    save_saelens(load_dictionary(tmp_path / "ours"), tmp_path / "theirs")
    last = load_dictionary(tmp_path / "theirs")
    assert torch.equal(last.encode(x).to_dense(), sae.encode(x).to_dense())
    assert torch.equal(last(x), sae(x))
    kept = load_file(tmp_path / "theirs" / "sae_weights.safetensors")
    assert torch.equal(kept["W_enc"], stored["W_enc"] if "W_enc" in stored else stored["encoder.weight"].T)
    assert torch.equal(kept["W_dec"], stored["W_dec"] if "W_dec" in stored else stored["decoder.weight"].T)


def test_dictionary_learning_that_does_not_fit_is_refused(tmp_path):
    config = tmp_path / "config.json"
    save_file(learned("AutoEncoder"), tmp_path / "ae.safetensors")
    for text, message in (
        (
            {"trainer": {"dict_class": "IdentityDict"}},
            "dict_class of the source must be one of AutoEncoder, .*Identity",
        ),
        ({"trainer": {"dict_class": "GatedAutoEncoder"}}, "got missing: .*gate_bias, .*; unknown: bias, encoder.bias"),
        (
            {"trainer": {"dict_class": "JumpReluAutoEncoder"}},
            "source must hold a matrix W_enc, got bias, decoder.weight",
        ),
        ({"trainer": {"dict_class": "AutoEncoderTopK"}}, "k of the source must be at least 1, got 0"),
        ({}, "source must say its trainer in config.json, got NoneType"),
    ):
        config.write_text(json.dumps(text))
        with pytest.raises(InputError, match=message):
            load_dictionary(tmp_path)


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify_is_read_by_its_formulas(tmp_path, transcode):
    torch.manual_seed(0)
    stored = {"encoder.weight": torch.randn(M, D), "encoder.bias": torch.randn(M), "W_dec": torch.randn(M, D)}
    stored["b_dec"] = torch.randn(D)
    config = {"activation": "topk", "k": K, "num_latents": M, "d_in": D, "transcode": transcode}
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"skip_connection": False, "normalize_decoder": True}))
    save_file(stored, tmp_path / "sae.safetensors")
    sae, x = load_dictionary(tmp_path), inputs()
    pre = ((x if transcode else x - stored["b_dec"]) @ stored["encoder.weight"].T + stored["encoder.bias"]).relu()
    codes = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, pre.topk(K).values)
    torch.testing.assert_close(sae.encode(x).to_dense(), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), codes @ stored["W_dec"] + stored["b_dec"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, "activation of the source must be one of topk, got groupmax"),
        ({"skip_connection": True}, "skip_connection of the source must be false, got True"),
        ({"num_latents": 0, "expansion_factor": 2}, r"hold encoder.weight of shape \[12, 6\], as its settings say"),
        ({"k": 0}, "k of the source must be at least 1, got 0"),
    ],
)
def test_sparsify_that_does_not_fit_is_refused(tmp_path, changes, message):
    stored = {"encoder.weight": torch.randn(M, D), "encoder.bias": torch.randn(M), "W_dec": torch.randn(M, D)}
    save_file(stored | {"b_dec": torch.randn(D)}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"k": K, "num_latents": M, "d_in": D} | changes))
    with pytest.raises(InputError, match=message):
        load_dictionary(tmp_path)


def test_a_scale_is_for_saelens_only(tmp_path):
    save_dictionary(trained("topk"), tmp_path)
    with pytest.raises(InputError, match="scale must be given for the layout of SAELens only, got 2"):
        load_dictionary(tmp_path, scale=2)
