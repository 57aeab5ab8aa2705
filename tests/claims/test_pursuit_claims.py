"""Parts of the claims on pursuit and classical coding: trees, indices of similarity, patches, pictures of atoms."""

import base64
import struct

import pytest
import torch

from paucity.claims import itda_model_similarity
from paucity.claims.itda_model_similarity import linear_cka, relative_similarity, svcca
from paucity.claims.mp_sae_hierarchical import LONE, PARENTS, WIDTH, Tree, _measure
from paucity.claims.natural_images import atoms_png, draw_patches, orientation, whitened
from paucity.dictionary.matching_pursuit import MatchingPursuit

INDICES = ("itda", "itda_official_threshold", "cka", "svcca", "relative")


@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_a_tree_is_as_it_is_said(correlation):
    tree = Tree.draw(correlation, seed=1)
    gram = tree.concepts @ tree.concepts.T
    torch.testing.assert_close(gram.diagonal(), torch.ones(WIDTH))
    top = PARENTS + LONE
    assert gram[:top, :top].fill_diagonal_(correlation).sub(correlation).abs().max() < 1e-5
    assert gram[:top, top:].abs().max() < 1e-5
    torch.testing.assert_close(gram[top, top + 1], torch.tensor(correlation), atol=1e-5, rtol=0)
    assert abs(float(gram[top, top + 3])) < 1e-5
    codes = tree.sample(20_000, 0) @ torch.linalg.inv(tree.concepts)
    active = codes.abs() > 0.05
    assert abs(float(active.sum(1).float().mean()) - 1.36) < 0.02
    assert (active[:, :top].sum(1) == 1).float().mean() > 0.999
    children = active[:, top : top + 3].any(1)
    assert active[children, 0].float().mean() > 0.999


def test_the_true_atoms_are_found_to_be_true():
    tree = Tree.draw(0.3, seed=2)
    perfect = MatchingPursuit(WIDTH, WIDTH, 20, tolerance=0.05, stop_on_repeat=True, centre=False)
    with torch.no_grad():
        perfect.decoder.copy_(tree.concepts[torch.randperm(WIDTH)])
    figures = _measure(perfect, tree, tree.sample(500, 3))
    assert figures["mcc"] > 0.9999
    assert figures["parent_in_child"] < 1e-3
    with torch.no_grad():
        perfect.decoder.copy_(tree.concepts)
        merged = tree.concepts[PARENTS + LONE] + tree.concepts[0]
        perfect.decoder[PARENTS + LONE] = merged / merged.norm()
    assert _measure(perfect, tree, tree.sample(500, 3))["parent_in_child"] > 0.05


def test_indices_of_similarity_know_a_rotation():
    x, turn = torch.randn(400, 12), torch.linalg.qr(torch.randn(12, 12))[0]
    other = torch.randn(400, 12)
    for index in (linear_cka, svcca, lambda a, b: relative_similarity(a, b, seed=0)):
        assert index(x, x @ turn) == pytest.approx(1, abs=1e-3)
        assert index(x, other) < 0.5


def test_every_index_finds_the_layers_of_a_model_in_itself(monkeypatch):
    monkeypatch.setattr(itda_model_similarity, "LAYERS", 3)
    monkeypatch.setattr(itda_model_similarity, "ANCHORS", 50)
    monkeypatch.setattr(itda_model_similarity, "held_out_python", lambda: "def f(x):\n    return x + 1\n" * 80)
    monkeypatch.setattr(
        itda_model_similarity, "python_documents", lambda **_: [f"def f{i}(x):\n    return {i}\n" for i in range(200)]
    )
    trained = itda_model_similarity._trained
    monkeypatch.setattr(itda_model_similarity, "_trained", lambda text, steps, seed: trained(text, 2, 0))
    result = itda_model_similarity.run(quick=True)
    assert result.measured["layers_found"] == dict.fromkeys(INDICES, 1.0)
    assert not result.holds  # not more than any other
    assert all(1 <= count <= 16 * 64 for each in result.measured["atoms"] for count in each)


def test_pictures_become_white_up_to_the_cut():
    rows, cols = torch.fft.fftfreq(80), torch.fft.rfftfreq(90)
    frequency = (rows.square().unsqueeze(1) + cols.square()).sqrt()
    noise = torch.randn(80, 90, generator=torch.Generator().manual_seed(0))
    natural = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency.clamp_min(0.01), s=noise.shape)
    flat = whitened(3 * natural + 7)
    assert flat.std() == pytest.approx(1, abs=1e-4)
    assert flat.mean() == pytest.approx(0, abs=1e-4)
    power = torch.fft.rfft2(flat).abs().square()
    low, middle, high = (
        power[(frequency > a) & (frequency < b)].mean() for a, b in ((0.02, 0.1), (0.1, 0.25), (0.5, 1))
    )
    assert 0.6 < low / middle < 1.6
    assert high < 0.05 * middle
    torch.testing.assert_close(whitened(natural), flat, rtol=1e-3, atol=1e-3)
    patches = draw_patches([flat, flat[:40]], 6, 400, seed=0)
    assert patches.shape == (400, 36)
    assert patches.norm(dim=1).mean() == pytest.approx(1, abs=1e-5)
    assert torch.equal(patches, draw_patches([flat, flat[:40]], 6, 400, seed=0))


def test_orientation_of_a_grating_and_of_a_spot():
    rows, cols = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    grating = torch.cos(2 * torch.pi * (cols + 2 * rows) / 12)
    spot = torch.exp(-((rows - 5.5) ** 2 + (cols - 5.5) ** 2) / 3)
    found = orientation(torch.stack([grating, spot]).flatten(1), 12)
    assert found[0] > 0.99
    assert found[1] < 0.45


def test_the_picture_of_atoms_is_a_png_of_their_size():
    pytest.importorskip("matplotlib")
    data = base64.b64decode(atoms_png(torch.randn(9, 16), 4))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (16, 16)
