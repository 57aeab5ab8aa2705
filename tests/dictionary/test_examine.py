"""What is asked of trained dictionaries: planted absorption, the truth, other trainings, letters, from the shell."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from typer.testing import CliRunner

from paucity.checks import InputError
from paucity.cli import app
from paucity.dictionary import to_folder
from paucity.dictionary.examine import against_truth, letters, over_seeds, over_trainings, read_truth
from paucity.dictionary.files import save_dictionary
from paucity.dictionary.sae import SparseAutoencoder
from paucity.dictionary.topk import TopK
from paucity.dictionary.trainer import train
from paucity.measure.code_probes import Labelled, absorption
from paucity.models.load import load

PARENT, CHILDREN, WIDTH = 0, 20, 24


def rows(count, seed, *, only_with_parent):
    """Half of the rows have the parent's direction, half a child's: any row's, or only rows of the parent."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.rand(count, generator=generator) < 0.5
    has = torch.rand(count, generator=generator) < 0.5
    has &= label if only_with_parent else torch.ones_like(label)
    child = torch.randint(1, 1 + CHILDREN, (count,), generator=generator)
    other = torch.randint(1 + CHILDREN, WIDTH, (count,), generator=generator)
    x, at = 0.02 * torch.randn(count, WIDTH, generator=generator), torch.arange(count)
    x[at, PARENT] += label.float()
    x[at[has], child[has]] += 1
    x[at[~label], other[~label]] += 1
    return x, label.long()


def trained(absorbing):
    """A dictionary that starts near a solution, children with the parent in them or without, and is trained on."""
    atoms = torch.eye(WIDTH)
    if absorbing:
        atoms[1 : 1 + CHILDREN, PARENT] = 1
    found = SparseAutoencoder(WIDTH, WIDTH, TopK(1 if absorbing else 2), auxiliary=0)
    with torch.no_grad():
        found.decoder.copy_(F.normalize(atoms, dim=1))
        found.encoder.copy_(found.decoder)
    x, label = rows(4000, 0, only_with_parent=absorbing)
    options = {"normalise": False, "centre": False, "learning_rate": 3e-3}
    assert train(found, x, num_tokens=100 * 256, batch_size=256, **options).history[-1].fvu[0] < 0.05
    y, other = rows(2000, 1, only_with_parent=absorbing)
    return absorption(
        Labelled(x, found.encode(x), label), Labelled(y, found.encode(y), other), found.atoms, classes=[1]
    )


def test_a_trained_dictionary_absorbs_where_children_imply_their_parent():
    absorbed, free = trained(absorbing=True), trained(absorbing=False)
    assert absorbed.main[1] == free.main[1] == (PARENT,)
    assert absorbed.full.value == pytest.approx(0.5, abs=0.06)  # the rows that have a child
    assert absorbed.fraction.value == pytest.approx(0.5, abs=0.06)
    assert free.full.value < 0.02
    assert free.fraction.value < 0.02


def test_truth_trainings_and_seeds(tmp_path):
    each = [SparseAutoencoder(6, 8, TopK(2), seed=seed) for seed in (0, 1)]
    truth = each[0].atoms.detach()[:5]
    assert against_truth(each[0], truth)["mcc"]["value"] == pytest.approx(1)
    assert against_truth(each[1], truth)["mcc"]["value"] < 0.95
    assert over_trainings([each[0], each[0]])["stability"]["value"] == pytest.approx(1)
    found = over_seeds([{"fvu": 0.1, "num_tokens": 5, "score": None}, {"fvu": 0.3, "num_tokens": 5, "score": 1.0}])
    assert set(found) == {"fvu"}
    assert found["fvu"]["value"] == pytest.approx(0.2)
    assert found["fvu"]["low"] < 0.2 < found["fvu"]["high"]
    save_file({"atoms": truth.contiguous()}, tmp_path / "truth.safetensors")
    assert torch.equal(read_truth(tmp_path / "truth.safetensors", 6), truth)
    with pytest.raises(InputError, match="shape"):
        read_truth(tmp_path / "truth.safetensors", 7)
    save_file({"a": truth.clone(), "b": truth.clone()}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="be one tensor, got a, b"):
        read_truth(tmp_path / "two.safetensors", 6)
    (tmp_path / "bad").write_bytes(b"pickle")
    for name in ("bad", "none"):
        with pytest.raises(InputError, match="be a safetensors file"):
            read_truth(tmp_path / name, 6)


def test_letters_of_the_embedded_model():
    loaded = load("embedded", dtype="float32")
    dictionary = SparseAutoencoder(256, 64, TopK(8))
    found = letters(loaded, "residual.0", dictionary)
    again = letters(loaded, "residual.0", dictionary)
    assert found == again
    assert found["words"] > 500
    assert len(found["letters"]) > 10
    assert set(found["probe"]) == {"1", "5"}
    assert 0.4 < found["probe"]["1"]["value"] <= found["dense"]["value"] + 0.1
    assert found["dense"]["low"] < found["dense"]["value"] < found["dense"]["high"]
    assert "none" in found["absorption"] or 0 <= found["absorption"]["full"]["value"] <= 1


def test_eval_of_what_knows_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr(to_folder, "load", lambda source: pytest.fail("no model is asked for"))
    first, second = (SparseAutoencoder(6, 8, TopK(2), seed=seed) for seed in (0, 1))
    save_dictionary(first, tmp_path / "first")
    save_dictionary(second, tmp_path / "second")
    save_file({"atoms": first.atoms.detach()[:5].contiguous()}, tmp_path / "truth.safetensors")

    def run(*words):
        return CliRunner().invoke(app, ["dictionary", "eval", str(tmp_path / "first"), *map(str, words)])

    asked = ("--truth", tmp_path / "truth.safetensors", "--against", tmp_path / "second")
    (record,) = json.loads(run(*asked, "--json").stdout)["dictionaries"]
    assert record["metrics"] is None
    assert record["asked"]["mcc"]["value"] == pytest.approx(1)
    assert 0 < record["asked"]["stability"]["value"] < 1
    assert "mcc 1.000" in run(*asked).stdout
    assert "--model" in str(run().exception)
    wide = SparseAutoencoder(7, 8, TopK(2))
    save_dictionary(wide, tmp_path / "wide")
    assert "have atoms 6 wide" in str(run("--against", tmp_path / "wide").exception)
