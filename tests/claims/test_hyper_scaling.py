"""The claim of hyper about its scaling, at small sizes."""

import pytest
import torch

from paucity.claims import CLAIMS, hyper_scaling


@pytest.fixture
def small(monkeypatch):
    for name, size in {
        "EXACT_LENGTH": 32,
        "BLOCK": 16,
        "QUICK_LENGTHS": (32, 64, 128),
        "QUICK_ERROR_LENGTH": 256,
    }.items():
        monkeypatch.setattr(hyper_scaling, name, size)


@pytest.mark.usefixtures("small")
def test_it_says_what_it_measured():
    result = hyper_scaling.run(quick=True, seed=1)
    assert (result.claim, result.statement) == ("hyper-scaling", CLAIMS["hyper-scaling"].statement)
    assert isinstance(result.holds, bool)
    assert [row["length"] for row in result.measured["causal"]["by_length"]] == [32, 64, 128]
    densities = [row["density"] for row in result.measured["causal"]["by_length"]]
    assert densities[0] == 1.0
    assert densities[0] > densities[1] > densities[2]
    error = result.measured["error"]["clustered"]["causal"][0]
    assert 0 < error["relative"] < 1
    assert 0 < error["spectral"] < 1
    assert set(result.measured["unmasked"]["exponents"]) == {"exact", "own_exact", "hyper"}


@pytest.mark.parametrize(
    ("seconds", "speedups", "wanted"),
    [((4.0, 8.0), (2.0, 4.0), True), ((4.0, 8.0), (4.0, 2.0), False), ((4.0, 16.0), (2.0, 4.0), False)],
)
def test_the_verdict_follows_from_the_figures(seconds, speedups, wanted):
    lengths = (8192, 16384)
    rows = [{"length": n, "speedup": {"exact": s}} for n, s in zip(lengths, speedups, strict=True)]
    exponents = {"exact": 2.0, "hyper": hyper_scaling._slope(lengths, list(seconds))}
    assert hyper_scaling._holds({"by_length": rows, "exponents": exponents}) is wanted


def test_clusters_are_clusters():
    query, key, _ = hyper_scaling.draw_inputs("clustered", 512, 0)
    logits = query[0, 0] @ key[0, 0].T / 8
    high = (logits > 5).float().mean()
    assert float(high) == pytest.approx(1 / hyper_scaling.CLUSTERS, rel=0.3)
    assert logits.max() <= 8.0 + 1e-4
    assert torch.equal(query, hyper_scaling.draw_inputs("clustered", 512, 0)[0])
