"""The layout of SAELens, by its formulas and against the package itself where a Python has it.

``PAUCITY_SAELENS_PYTHON`` names that Python; without it, this one is asked.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paucity.checks import InputError
from paucity.dictionary.abs_topk import AbsTopK
from paucity.dictionary.batch_topk import BatchTopK
from paucity.dictionary.feature_choice import FeatureChoice
from paucity.dictionary.files import load_dictionary, save_dictionary
from paucity.dictionary.gated import Gated
from paucity.dictionary.jumprelu import JumpReLU
from paucity.dictionary.matching_pursuit import MatchingPursuit
from paucity.dictionary.matryoshka import matryoshka_sae
from paucity.dictionary.mutual_choice import MutualChoice
from paucity.dictionary.relu import ReLU
from paucity.dictionary.sae import SparseAutoencoder
from paucity.dictionary.saelens import read_saelens, save_saelens
from paucity.dictionary.top_afa import TopAFA
from paucity.dictionary.topk import TopK

from .saelens_peer import D_IN, D_OUT, D_SAE, THEIRS, K

PEER = Path(__file__).with_name("saelens_peer.py")
RULES = {
    "relu": ReLU,
    "topk": lambda: TopK(K),
    "abs_topk": lambda: AbsTopK(K),
    "gated": Gated,
    "jumprelu": JumpReLU,
    "batch_topk": lambda: BatchTopK(K),
    "mutual_choice": lambda: MutualChoice(K),
    "feature_choice": lambda: FeatureChoice(K),
}


def shaken(dictionary):
    """With parameters and thresholds that are not those of the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in dictionary.state_dict().items():
            if value.is_floating_point() and "usage" not in name:
                value += 0.2 * torch.rand(value.shape, generator=generator)
        dictionary.after_step()
    return dictionary.eval()


def ours():
    made = {name: SparseAutoencoder(D_IN, D_SAE, rule()) for name, rule in RULES.items()}
    made["matryoshka"] = matryoshka_sae(D_IN, D_SAE, k=K)
    made["plain"] = SparseAutoencoder(D_IN, D_SAE, TopK(K), centre=False)
    made["transcoder"] = SparseAutoencoder(D_IN, D_SAE, ReLU(), output_size=D_OUT)
    made["jumprelu_transcoder"] = SparseAutoencoder(D_IN, D_SAE, JumpReLU(), output_size=D_OUT)
    made["matching_pursuit"] = MatchingPursuit(D_IN, D_SAE, K, tolerance=0.5, stop_on_repeat=True)
    return {name: shaken(each) for name, each in made.items()}


def inputs():
    return torch.randn(50, D_IN, generator=torch.Generator().manual_seed(2))


def by_formula(config, stored, x):
    """What SAELens's documentation says of each architecture, on dense codes."""
    kind, norms = config["architecture"], stored["W_dec"].norm(dim=1)
    centred = x - stored["b_dec"] if config["apply_b_dec_to_input"] else x
    pre = centred @ stored["W_enc"] + stored.get("b_enc", 0)
    if config.get("rescale_acts_by_decoder_norm"):
        pre = pre * norms
    if kind in ("topk", "abstopk"):
        rank = pre if kind == "topk" else pre.abs()
        kept = torch.zeros_like(pre).scatter(1, rank.topk(config["k"]).indices, 1.0)
        codes = kept * (pre.relu() if kind == "topk" else pre)
    elif kind == "gated":
        gate = centred @ stored["W_enc"] + stored["b_gate"] > 0
        codes = gate * (centred @ (stored["W_enc"] * stored["r_mag"].exp()) + stored["b_mag"]).relu()
    else:
        codes = pre.relu() * (pre > stored.get("threshold", torch.zeros(())))
    scaled = codes / norms if config.get("rescale_acts_by_decoder_norm") else codes
    return codes, scaled @ stored["W_dec"] + stored["b_dec"]


def written(tmp_path, **changes):
    config = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": {"sae_lens_version": "6.5.0"}}
    torch.manual_seed(0)
    stored = {
        "W_enc": torch.randn(D_IN, D_SAE),
        "b_enc": torch.randn(D_SAE),
        "W_dec": torch.randn(D_SAE, D_IN),
        "b_dec": torch.randn(D_IN),
    }
    config |= {name: value for name, value in changes.items() if not isinstance(value, torch.Tensor)}
    stored |= {name: value for name, value in changes.items() if isinstance(value, torch.Tensor)}
    stored = {name: stored[name] for name in stored if not (config["architecture"] == "gated" and name == "b_enc")}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    save_file(stored, tmp_path / "sae_weights.safetensors")
    return config, stored


@pytest.mark.parametrize("name", ours())
def test_the_files_say_what_the_dictionary_computes(tmp_path, name):
    dictionary, x = ours()[name], inputs()
    save_saelens(dictionary, tmp_path, metadata={"model_name": "toy"}, sparsity=torch.arange(D_SAE).float())
    assert {path.name for path in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
    config = json.loads((tmp_path / "cfg.json").read_text())
    if name != "matching_pursuit":
        codes, out = by_formula(config, load_file(tmp_path / "sae_weights.safetensors"), x)
        torch.testing.assert_close(dictionary.encode(x).to_dense(), codes)
        torch.testing.assert_close(dictionary(x), out)
    found = read_saelens(tmp_path)
    assert torch.equal(found.dictionary.encode(x).to_dense(), dictionary.encode(x).to_dense())
    assert torch.equal(found.dictionary(x), dictionary(x))
    assert torch.equal(found.dictionary.atoms, dictionary.atoms)
    assert found.metadata["model_name"] == "toy"
    assert torch.equal(found.sparsity, torch.arange(D_SAE).float())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"apply_b_dec_to_input": False},
        {"architecture": "topk", "k": K},
        {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
        {"architecture": "abstopk", "k": K, "rescale_acts_by_decoder_norm": True},
        {"architecture": "jumprelu", "threshold": torch.linspace(-1, 2, D_SAE)},
        {"architecture": "gated", "b_gate": torch.ones(D_SAE), "b_mag": -torch.ones(D_SAE), "r_mag": torch.ones(D_SAE)},
    ],
)
def test_their_files_are_read_by_their_formulas(tmp_path, changes):
    config, stored = written(tmp_path, **changes)
    sae, x = load_dictionary(tmp_path), inputs()
    codes, out = by_formula(config, stored, x)
    torch.testing.assert_close(sae.encode(x).to_dense(), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), out, rtol=1e-4, atol=1e-4)
    again = tmp_path / "again"
    save_saelens(sae, again)
    if not config.get("rescale_acts_by_decoder_norm"):
        kept = load_file(again / "sae_weights.safetensors")
        stored = stored | ({"threshold": stored["threshold"].clamp_min(0)} if "threshold" in stored else {})
        assert kept.keys() == stored.keys()
        assert all(torch.equal(kept[name], stored[name]) for name in kept)


def test_what_older_versions_wrote(tmp_path):
    old = {"metadata": {}, "hook_point": "blocks.0", "normalize_activations": False, "architecture": "standard"}
    config, stored = written(tmp_path, **old, activation_fn_str="topk", activation_fn_kwargs={"k": K})
    found, x = read_saelens(tmp_path), inputs()
    assert found.metadata == {"hook_name": "blocks.0"}
    codes, _ = by_formula(config | {"architecture": "topk", "k": K}, stored, x)
    torch.testing.assert_close(found.dictionary.encode(x).to_dense(), codes, rtol=1e-4, atol=1e-5)
    written(tmp_path, **old, scaling_factor=torch.ones(D_SAE))
    assert isinstance(read_saelens(tmp_path).dictionary.rule, ReLU)
    written(tmp_path, **old, scaling_factor=torch.full((D_SAE,), 2.0))
    with pytest.raises(InputError, match="source must have no fine-tuning factors, got scaling_factor other than 1"):
        read_saelens(tmp_path)
    written(tmp_path, **old, activation_fn="tanh-relu")
    with pytest.raises(InputError, match="activation of the source must be relu or topk, got tanh-relu"):
        read_saelens(tmp_path)


def test_a_factor_that_the_files_do_not_hold_is_asked_for_and_folded_in(tmp_path):
    config, stored = written(tmp_path, normalize_activations="expected_average_only_in")
    with pytest.raises(InputError, match=r"scale must be given, as the source was trained on activations of mean norm"):
        load_dictionary(tmp_path)
    x = inputs()
    codes, out = by_formula(config, stored, 4 * x)
    sae = load_dictionary(tmp_path, scale=4.0)
    torch.testing.assert_close(sae.encode(x).to_dense(), codes / 4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), out / 4, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load_dictionary(tmp_path, scale=1.0)(4 * x), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "temporal"}, r"architecture of the source must be one of abstopk, .*, got temporal"),
        ({"normalize_activations": "layer_norm"}, r"normalize_activations of the source must be none or .*layer_norm"),
        ({"dtype": "int8"}, r"dtype of the source must be one of torch.float16, .*, got int8"),
        ({"architecture": "topk"}, r"k of the source must be at least 1, got 0"),
        ({"architecture": "topk", "k": D_SAE + 1}, r"TopK: k must be in \[1, 30\], got 31"),
        ({"d_sae": D_SAE + 1}, r"source must hold W_enc of shape \[31, 8\], as its settings say, got \[30, 8\]"),
        ({"architecture": "jumprelu"}, r"tensors of SparseAutoencoder, got missing: threshold; unknown: none"),
        ({"threshold": torch.ones(D_SAE)}, r"got missing: none; unknown: threshold"),
        ({"b_enc": torch.full((D_SAE,), torch.nan)}, r"finite numbers in b_enc, got NaN or infinity"),
        ({"d_in": "8"}, r"d_in of the source must be an integer, got '8'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    written(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        load_dictionary(tmp_path)


def test_what_saelens_has_no_architecture_for_is_refused(tmp_path):
    for dictionary, got in (
        (SparseAutoencoder(D_IN, D_SAE, TopAFA()), "TopAFA from 8 to 8"),
        (SparseAutoencoder(D_IN, D_SAE, TopK(K), output_size=D_OUT), "TopK from 8 to 5"),
        (MatchingPursuit(D_IN, D_SAE, K, signed=True), "MatchingPursuit"),
    ):
        with pytest.raises(InputError, match=f"dictionary must be one that SAELens has, got {got}"):
            save_saelens(dictionary, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match=r"sparsity must have shape \[30\], got \[3\]"):
        save_saelens(SparseAutoencoder(D_IN, D_SAE, TopK(K)), tmp_path / "new", sparsity=torch.ones(3))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    python = os.environ.get("PAUCITY_SAELENS_PYTHON")
    if python is None and importlib.util.find_spec("sae_lens") is None:
        pytest.skip("sae-lens is not installed, and PAUCITY_SAELENS_PYTHON names no Python that has it")
    work = tmp_path_factory.mktemp("peer")
    save_file({"x": inputs()}, work / "x.safetensors")
    for name, dictionary in ours().items():
        save_saelens(dictionary, work / "ours" / name, metadata={"model_name": "toy"})
    command = [python or sys.executable, "-W", "ignore", str(PEER), str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return work, load_file(work / "told.safetensors")


@pytest.mark.parametrize("name", ours())
def test_saelens_computes_the_same_with_our_files(told, name):
    dictionary, x = ours()[name], inputs()
    torch.testing.assert_close(told[1][f"ours.{name}.codes"], dictionary.encode(x).to_dense())
    torch.testing.assert_close(told[1][f"ours.{name}.out"], dictionary(x).detach())


@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_the_same_with_the_files_of_saelens(told, name):
    work, results = told
    found, x = read_saelens(work / "theirs" / name), inputs()
    assert found.metadata["model_name"] == "toy"
    sae = found.dictionary
    near = {"rtol": 1e-4, "atol": 1e-5} if sae.atoms.dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(sae.encode(x).to_dense().float(), results[f"theirs.{name}.codes"], **near)
    torch.testing.assert_close(sae(x).float().detach(), results[f"theirs.{name}.out"], **near)


def test_a_folder_that_is_written_over_keeps_nothing_of_the_old(tmp_path):
    save_saelens(SparseAutoencoder(D_IN, 30, TopK(K)), tmp_path, sparsity=torch.zeros(30))
    assert read_saelens(tmp_path).sparsity is not None
    save_saelens(SparseAutoencoder(D_IN, 40, TopK(K)), tmp_path, metadata={"hook_name": "blocks.0.attn.hook_z"})
    found = read_saelens(tmp_path)
    assert found.sparsity is None
    assert found.reshape == "hook_z"
    save_saelens(found.dictionary, tmp_path, reshape="none")
    assert read_saelens(tmp_path).reshape == "none"
    with pytest.raises(InputError, match="reshape must be one of"):
        save_saelens(found.dictionary, tmp_path, reshape="flat")
    save_file({"sparsity": torch.zeros(30)}, tmp_path / "sparsity.safetensors")
    with pytest.raises(InputError, match="sparsity of the source must have shape"):
        read_saelens(tmp_path)
    save_dictionary(found.dictionary, tmp_path)
    with pytest.raises(InputError, match=r"hold one dictionary, got .* with two"):
        load_dictionary(tmp_path)
