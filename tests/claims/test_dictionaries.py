"""Claims on dictionaries: what they share, and each of them on a tiny model whose verdict follows from its figures."""

import importlib
from dataclasses import replace

import pytest
import torch

from paucity.claims import CLAIMS, dark_matter_linear, dictionaries
from paucity.claims.base import ClaimResult
from paucity.claims.dictionaries import LENGTH, Embedded, Sizes
from paucity.dictionary.topk import TopK
from paucity.models.load import Loaded, byte_tokenizer

TINY = Sizes(2 * LENGTH, 2 * LENGTH, LENGTH, 512, 128, 48, 4, 2)
NAMES = (
    "abstopk-bidirectional",
    "dark-matter-linear",
    "gsae-more-faithful",
    "mutual-feature-choice-fewer-dead",
    "top-afa-no-k",
    "vsae-more-dead",
)


@pytest.fixture
def tiny(tiny_model, monkeypatch):
    model = tiny_model("llama", vocab_size=300)
    model.config.max_position_embeddings = 2048
    loaded = Loaded(model, byte_tokenizer(300), "tiny")
    monkeypatch.setattr(
        dictionaries, "find_hook", lambda model, name, find=dictionaries.find_hook: find(model, "residual.0")
    )
    monkeypatch.setattr(dictionaries, "held_out_python", lambda: "def f(x):\n    return x\n" * 120)
    monkeypatch.setattr(
        dictionaries, "python_documents", lambda **_: [f"def f{i}(x):\n    return {i}\n" for i in range(200)]
    )
    monkeypatch.setattr(dictionaries, "load", lambda *args, **options: loaded)
    monkeypatch.setattr(dictionaries, "QUICK", TINY)
    return loaded


def test_activations_are_those_of_tokens_with_a_past_and_a_future(tiny):
    plain, both = (Embedded("t", TINY, seed=0, gradients=gradients) for gradients in (False, True))
    assert plain.activations.shape == (2 * (LENGTH - 1), 32)
    assert both.activations.shape == both.gradients.shape == (2 * (LENGTH - 2), 32)
    expected = plain.activations.view(2, LENGTH - 1, 32)[:, :-1].flatten(0, 1)
    torch.testing.assert_close(both.activations, expected)


def test_what_is_kept_is_measured(tiny):
    job = Embedded("t", TINY, seed=0)
    (sae,) = job.train([TopK(4)], 0)
    kept = job.kept(sae, spliced=True)
    codes, x = sae.encode(job.held_out), job.held_out.double()
    out = sae.decode(codes).detach().double()
    assert kept.fvu == pytest.approx(float((out - x).square().sum() / (x - x.mean(0)).square().sum()), rel=1e-4)
    dense = codes.to_dense().detach()
    assert kept.dead == pytest.approx(float((dense == 0).all(0).double().mean()))
    assert kept.l0 == pytest.approx(float((dense != 0).sum(1).double().mean()))
    assert kept.nats is not None
    assert kept.nats != 0


def test_a_perfect_dictionary_costs_nothing(tiny):
    job = Embedded("t", TINY, seed=0)
    sae = job.train([TopK(4)], 0)[0]
    sae.forward = lambda x: x
    assert job.kept(sae, spliced=True).nats == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_claims_run(tiny, name):
    result = importlib.import_module(f"paucity.claims.{CLAIMS[name].module}").run(quick=True, seed=0)
    assert isinstance(result, ClaimResult)
    assert isinstance(result.holds, bool)
    assert (result.claim, result.paper, result.statement) == (name, CLAIMS[name].paper, CLAIMS[name].statement)
    assert result.settings["model"] == "tiny"
    assert result.settings["k"] == 4 or name == "top-afa-no-k"


def test_errors_are_fit_and_tested_on_halves_of_a_text_that_no_dictionary_has_seen(tiny, monkeypatch):
    halves = []
    real = dark_matter_linear.dark_matter
    monkeypatch.setattr(dark_matter_linear, "dark_matter", lambda sae, *two: halves.append(two) or real(sae, *two))
    result = dark_matter_linear.run(quick=True, seed=0)
    held_out = Embedded("t", replace(TINY, held_out_tokens=2 * TINY.held_out_tokens), seed=0).held_out
    assert result.settings["held_out_tokens"] == 2 * TINY.held_out_tokens
    for two in halves:
        assert torch.equal(torch.cat(two).sort(0).values, held_out.sort(0).values)
        assert not torch.equal(torch.cat(two), held_out)
