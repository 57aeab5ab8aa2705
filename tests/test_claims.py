"""Claims: registered, documented, and their verdict follows from the figures."""

import dataclasses
import importlib
import inspect

import pytest

from paucity.catalog import METHODS
from paucity.claims import CLAIMS, pruned
from paucity.claims.base import ClaimResult
from paucity.models.load import Loaded, byte_tokenizer


def load_claim(name: str):
    return importlib.import_module(f"paucity.claims.{CLAIMS[name].module}")


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_names_its_paper_and_can_be_run(name):
    module = load_claim(name)
    assert CLAIMS[name].paper in module.__doc__
    assert CLAIMS[name].statement.endswith(".")
    assert {"quick", "seed"} <= set(inspect.signature(module.run).parameters)
    assert name in {claim for method in METHODS.values() for claim in method.claims}


ON_A_MODEL = [name for name in CLAIMS if "loaded" in inspect.signature(load_claim(name).run).parameters]


@pytest.mark.parametrize("name", ON_A_MODEL)
def test_a_claim_on_a_random_model_says_what_it_measured(tiny_model, name, monkeypatch):
    module = load_claim(name)
    model = tiny_model("llama", vocab_size=300)
    model.config.max_position_embeddings = 2048
    home = module if hasattr(module, "held_out_python") else pruned
    monkeypatch.setattr(home, "held_out_python", lambda: "def f(x):\n    return x\n" * 120)
    result = module.run(quick=True, seed=0, loaded=Loaded(model, byte_tokenizer(300), "tiny"))
    assert isinstance(result, ClaimResult)
    assert [field.name for field in dataclasses.fields(result)] == [
        *("claim", "paper", "statement", "paper_figure", "measured", "holds", "seconds", "seed", "settings")
    ]
    assert (result.claim, result.paper, result.statement) == (name, CLAIMS[name].paper, CLAIMS[name].statement)
    assert isinstance(result.holds, bool)
    assert result.settings["model"] == "tiny"
