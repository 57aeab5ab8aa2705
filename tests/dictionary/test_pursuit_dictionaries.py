"""MP-SAE, ITDA and RA-SAE: their contracts, what they promise, training, and refusals."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from paucity.checks import InputError
from paucity.dictionary.archetypal import Archetypal, kmeans_centroids
from paucity.dictionary.base import Batch
from paucity.dictionary.itda import ITDA, origin_similarity
from paucity.dictionary.matching_pursuit import MatchingPursuit
from paucity.dictionary.saelens import _as_saelens


def sparse_data(n=600, d=16, m=24, active=2, seed=7):
    generator = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(m, d, generator=generator), dim=1)
    chosen = torch.rand(n, m, generator=generator).argsort(1)[:, :active]
    codes = torch.zeros(n, m).scatter(1, chosen, 1 + torch.rand(n, active, generator=generator))
    return codes @ atoms, atoms


def batch(x, sae):
    return Batch(x, x, torch.zeros(sae.dict_size, dtype=torch.int64), 0, 10)


def test_mp_sae_learns_and_its_error_falls_with_k():
    x, _ = sparse_data()
    sae = MatchingPursuit(16, 24, k=2)
    before = float((sae(x) - x).detach().square().mean())
    sae.fit(x, num_tokens=60_000, batch_size=256, learning_rate=1e-2)
    assert float((sae(x) - x).detach().square().mean()) < 0.3 * before
    torch.testing.assert_close(sae.atoms.norm(dim=1), torch.ones(24))
    errors = []
    for sae.k in (1, 2, 4, 8):
        errors.append((sae(x) - x).norm(dim=1))
    assert all((after <= before + 1e-4).all() for before, after in pairwise(errors))
    assert sae(x.view(2, 300, 16)).shape == (2, 300, 16)


def test_mp_sae_eval_follows_its_atoms():
    """The products that are kept between calls are those of the present atoms."""
    x, _ = sparse_data(200)
    sae = MatchingPursuit(16, 24, k=4).eval()
    sae.encode(x)
    with torch.no_grad():
        sae.decoder.copy_(F.normalize(torch.randn(24, 16), dim=1))
    held = sae.encode(x)
    fresh = sae.train().encode(x)
    assert torch.equal(held.indices, fresh.indices)
    torch.testing.assert_close(held.values, fresh.values)


def test_mp_sae_rescale_and_settings():
    x, _ = sparse_data(50)
    sae = MatchingPursuit(16, 24, k=6, tolerance=0.5, signed=True, stop_on_repeat=True, seed=3)
    with torch.no_grad():
        sae.decoder_bias.copy_(torch.randn(16))
    before = sae(x)
    sae.rescale(3.0)
    torch.testing.assert_close(sae(3 * x), 3 * before, rtol=1e-4, atol=1e-4)
    again = MatchingPursuit(**(sae.settings() | {"tolerance": 0.5}))
    assert torch.equal(again.decoder, sae.decoder)
    codes = sae.encode(3 * x)
    assert (codes.values < 0).any()
    assert codes.l0().min() < 6


def test_mp_sae_gradient_leaves_norms_alone():
    x, _ = sparse_data(100)
    sae = MatchingPursuit(16, 24, k=3)
    objective = sae.objective(batch(x, sae))
    objective.loss.backward()
    sae.before_step()
    assert (sae.decoder.grad * sae.decoder).sum(1).abs().max() < 1e-4
    assert sae.decoder.grad.abs().max() > 0
    assert sae.decoder_bias.grad.abs().max() > 0


def test_mp_sae_with_free_norms_codes_and_learns():
    x, _ = sparse_data(300)
    sae = MatchingPursuit(16, 24, k=3, centre=False, unit=False, seed=1)
    with torch.no_grad():
        sae.decoder.mul_(torch.linspace(0.6, 1.2, 24).unsqueeze(1))
    codes = sae.encode(x)
    chosen = (x @ sae.decoder.T).argmax(1)
    assert torch.equal(codes.indices[:, 0].long(), chosen)
    torch.testing.assert_close(codes.values[:, 0], (x * sae.decoder[chosen]).sum(1))
    sae.objective(batch(x, sae)).loss.backward()
    sae.before_step()
    assert (sae.decoder.grad * sae.decoder).sum(1).abs().max() > 1e-3
    sae.fit(x, num_tokens=30_000, batch_size=100, learning_rate=1e-2)
    assert (sae.decoder.norm(dim=1) - 1).abs().max() > 1e-3
    assert float((sae(x) - x).detach().square().mean()) < 0.5 * float(x.square().mean())
    with pytest.raises(InputError, match="SAELens has"):
        _as_saelens(sae)
    sae.unit = True
    with pytest.raises(InputError, match="atoms must have norm 1"):
        sae.encode(x)


def test_itda_holds_activations_and_explains_what_it_saw():
    x, _ = sparse_data(500)
    itda = ITDA(16, 400, k=8, threshold=0.1)
    count = itda.fit(x, batch_size=128)
    assert 16 <= count < 200
    assert itda.dict_size == count
    rows = itda.origins[:, 1]
    torch.testing.assert_close(itda.atoms, F.normalize(x[rows], dim=1))
    assert len(set(rows.tolist())) == count
    error = (itda(x) - x).square().sum(1) / x.square().sum(1)
    # What was explained by the atoms of its time may be coded otherwise now; nearly all stays explained.
    assert (error <= 0.1 + 1e-4).float().mean() > 0.95


def test_itda_admits_no_copies_and_stops_at_its_size():
    x, _ = sparse_data(60)
    itda = ITDA(16, 400, k=4, threshold=0.3)
    itda.fit(torch.cat([x, x, 2 * x, torch.zeros(3, 16)]), batch_size=200)
    likeness = (itda.atoms @ itda.atoms.T).abs().fill_diagonal_(0)
    assert likeness.max() ** 2 < 0.7 + 1e-4
    small = ITDA(16, 5, k=4, threshold=0.05)
    assert small.fit(x) == 5


def test_itda_similarity_is_the_jaccard_index():
    x, _ = sparse_data(200)
    origins = torch.stack([torch.arange(200) // 10, torch.arange(200) % 10], 1)
    one, other, far = (ITDA(16, 100, k=4, threshold=0.2) for _ in range(3))
    one.fit(x, origins=origins)
    other.fit(x @ torch.linalg.qr(torch.randn(16, 16))[0], origins=origins)
    far.fit(torch.randn(200, 16), origins=origins)
    assert origin_similarity(one, one) == 1
    assert origin_similarity(one, other) > 0.9  # the same up to a rotation
    assert origin_similarity(one, far) < origin_similarity(one, other)
    first, second = ({tuple(r) for r in each.origins.tolist()} for each in (one, far))
    assert origin_similarity(one, far) == len(first & second) / len(first | second)


def test_archetypal_atoms_stay_near_the_hull():
    x, _ = sparse_data()
    sae = Archetypal(16, 12, k=3, num_centroids=40, delta=0.2)
    centroids = kmeans_centroids(x, 40)
    assert torch.equal(centroids, kmeans_centroids(x, 40))
    sae.fit(x, centroids=centroids, num_tokens=60_000, batch_size=256, learning_rate=1e-2)
    assert (sae.mixing >= 0).all()
    torch.testing.assert_close(sae.mixing.sum(1), torch.ones(12))
    assert (sae.away.norm(dim=1) <= sae.delta + 1e-5).all()
    hull = sae.atoms / sae.log_scale.exp() - sae.mixing @ centroids
    assert (hull.norm(dim=1) <= sae.delta + 1e-4).all()
    torch.testing.assert_close(sae.centroids, centroids)
    untrained = Archetypal(16, 12, k=3, num_centroids=40)
    untrained.place(centroids)
    assert (sae(x) - x).square().mean() < 0.8 * (untrained(x) - x).square().mean()


def test_archetypal_rescale():
    x, _ = sparse_data(80)
    sae = Archetypal(16, 12, k=3, num_centroids=20)
    sae.place(kmeans_centroids(x, 20))
    before = sae(x)
    sae.rescale(4.0)
    torch.testing.assert_close(sae(4 * x), 4 * before, rtol=1e-4, atol=1e-4)


def test_bad_input():
    x, _ = sparse_data(50)
    with pytest.raises(InputError, match="k must be at least 1, got 0"):
        MatchingPursuit(16, 24, 0)
    with pytest.raises(InputError, match=r"x must have shape \[50, 24\], got \[50, 16\]"):
        MatchingPursuit(24, 8).encode(x)
    with pytest.raises(InputError, match=r"ITDA.encode: the dictionary must be fit first"):
        ITDA(16, 8).encode(x)
    with pytest.raises(InputError, match=r"threshold must be in \(0, 1\)"):
        ITDA(16, 8, threshold=0.0)
    with pytest.raises(InputError, match="activations must be finite"):
        ITDA(16, 8).fit(x * torch.nan)
    with pytest.raises(InputError, match="number of origins must be at least 50"):
        ITDA(16, 8).fit(x, origins=torch.zeros(3, 2))
    with pytest.raises(InputError, match="dictionaries must be fit"):
        origin_similarity(ITDA(16, 8), ITDA(16, 8))
    with pytest.raises(InputError, match="num_centroids must be at least 12, got 5"):
        Archetypal(16, 12, 3, num_centroids=5)
    with pytest.raises(InputError, match="k must be in"):
        Archetypal(16, 12, 13)
    with pytest.raises(InputError, match="number of activations must be at least 80"):
        kmeans_centroids(x, 80)
