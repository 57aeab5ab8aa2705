"""Classical coding on the contract of dictionaries: sparse coding, K-SVD, scikit-learn's, concepts and tetrolets."""

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from paucity.checks import InputError
from paucity.dictionary.ksvd import KSVD
from paucity.dictionary.matching_pursuit import MatchingPursuit
from paucity.dictionary.nmf import NMF
from paucity.dictionary.online_learning import OnlineLearning
from paucity.dictionary.sparse_coding import SparseCoding, penalty_for
from paucity.dictionary.sparse_concept_coding import SparseConceptCoding, neighbour_embedding
from paucity.dictionary.tetrolets import (
    Tetrolets,
    bases,
    inverse_tetrolet_transform,
    tetrolet_transform,
    tilings,
)


def sparse_data(n=800, d=12, m=18, active=2, seed=7, signed=True):
    generator = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(m, d, generator=generator), dim=1)
    chosen = torch.rand(n, m, generator=generator).argsort(1)[:, :active]
    values = 1 + torch.rand(n, active, generator=generator)
    if signed:
        values *= torch.randint(0, 2, (n, active), generator=generator) * 2 - 1
    return torch.zeros(n, m).scatter(1, chosen, values) @ atoms, atoms


def likeness(found, true):
    cosine = (F.normalize(found, dim=1) @ true.T).abs()
    return float(cosine[linear_sum_assignment(-cosine.numpy())].mean())


def test_ksvd_finds_the_atoms():
    x, atoms = sparse_data()
    ksvd = KSVD(12, 18, k=2)
    history = ksvd.fit(x, num_iterations=25)
    assert history[-1] < 0.1 < history[0]
    assert likeness(ksvd.atoms, atoms) > 0.9
    torch.testing.assert_close(ksvd.atoms.norm(dim=1), torch.ones(18))
    assert (ksvd.encode(x).values < 0).any()


def test_an_update_of_ksvd_never_makes_the_error_larger():
    x, _ = sparse_data(300)
    ksvd = KSVD(12, 18, k=3)
    with torch.no_grad():
        codes = ksvd.encode(x)
        values, indices, left = codes.values.clone(), codes.indices.long(), x - ksvd.decode(codes)
        for atom in range(18):
            used = ((indices == atom) & (values != 0)).any()
            before = float(left.square().sum())
            ksvd._update(atom, x, left, torch.zeros(len(x), dtype=torch.bool), values, indices)
            assert float(left.square().sum()) <= before + 1e-3 or not used
    dense = torch.zeros(300, 18).scatter_add(1, indices, values)
    torch.testing.assert_close(left, x - dense @ ksvd.decoder, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("coder", ["ista", "fista", "hard", "cel0", "omp"])
def test_sparse_coding_learns(coder):
    x, _ = sparse_data()
    sparse = SparseCoding(12, 18, coder, penalty=0.1, k=2, num_steps=60)
    before = float((sparse(x) - x).detach().square().mean())
    sparse.fit(x, num_tokens=40_000, batch_size=400, learning_rate=2e-2, normalise=False)
    assert float((sparse(x) - x).detach().square().mean()) < 0.8 * before
    torch.testing.assert_close(sparse.atoms.norm(dim=1), torch.ones(18))
    codes = sparse.encode(x.view(2, 400, 12))
    assert codes.values.shape[:2] == (2, 400)
    assert (codes.values < 0).any()


@pytest.mark.parametrize("coder", ["ista", "hard", "cel0"])
def test_sparse_coding_follows_a_scale(coder):
    x, _ = sparse_data(60)
    sparse = SparseCoding(12, 18, coder, penalty=0.2, num_steps=30)
    before = sparse(x)
    sparse.rescale(5.0)
    torch.testing.assert_close(sparse(5 * x), 5 * before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("coder", ["ista", "hard", "cel0"])
def test_penalty_for_a_sparsity(coder):
    x, _ = sparse_data(300)
    sparse = SparseCoding(12, 18, coder, penalty=0.2, num_steps=50)
    found = penalty_for(sparse, x, 3.0)
    assert sparse.penalty == 0.2
    sparse.penalty = found
    assert abs(float(sparse.encode(x).l0().float().mean()) - 3.0) < 0.3


def test_online_learning():
    x, atoms = sparse_data(300)
    found = OnlineLearning(12, 18, penalty=0.2, k=2)
    found.fit(x, max_iter=6, batch_size=100)
    assert likeness(found.atoms, atoms) > 0.7
    assert OnlineLearning(**found.settings()).settings() == found.settings()
    for found.algorithm in ("lasso_lars", "lasso_cd", "lars", "omp"):
        codes = found.encode(x)
        assert (codes.values < 0).any()
        error = (found.decode(codes) - x).square().mean() / x.square().mean()
        assert error < (0.7 if found.algorithm == "lars" else 0.4)
        if found.algorithm in ("lars", "omp"):
            assert codes.l0().max() <= 2


def test_nmf_is_not_negative():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 4, generator=generator).clamp_min(0.5).sub(0.5) @ torch.rand(4, 12, generator=generator)
    nmf = NMF(12, 4)
    nmf.fit(x)
    codes = nmf.encode(x)
    assert (codes.values >= 0).all()
    assert (nmf.atoms >= 0).all()
    assert (nmf.decode(codes) - x).square().mean() < 0.01 * x.square().mean()
    other = NMF(12, 4)
    other.load_state_dict(nmf.state_dict())
    torch.testing.assert_close(other.encode(x).to_dense(), codes.to_dense())
    with pytest.raises(InputError, match="activations must not be negative"):
        nmf.fit(-x)
    with pytest.raises(InputError, match="must be fit first"):
        NMF(12, 4).encode(x)


def test_concepts_follow_neighbourhoods():
    """Three far groups: the first two smooth vectors tell them apart, and so do atoms and codes."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(90) % 3
    x = 4 * torch.eye(3, 8)[group] + 0.3 * torch.randn(90, 8, generator=generator)
    smooth = torch.from_numpy(neighbour_embedding(x.double().numpy(), 2, 20, 0).copy())
    spread = torch.stack([smooth[group == g].std(0).max() for g in range(3)]).max()
    centres = torch.stack([smooth[group == g].mean(0) for g in range(3)])
    assert torch.pdist(centres).min() > 5 * spread
    scc = SparseConceptCoding(8, 3, k=2)
    smooth = scc.fit(x)
    assert smooth.shape == (90, 3)
    codes = scc.encode(x)
    assert (codes.l0() <= 2).all()
    torch.testing.assert_close(scc.atoms.norm(dim=1), torch.ones(3))
    with pytest.raises(InputError, match="dict_size must be in"):
        SparseConceptCoding(8, 9)
    with pytest.raises(InputError, match="number of activations must be at least 5"):
        scc.fit(x[:4])


def connected(piece):
    seen, left = {piece[0]}, set(piece[1:])
    while near := {p for p in left if any(abs(p // 4 - q // 4) + abs(p % 4 - q % 4) == 1 for q in seen)}:
        seen |= near
        left -= near
    return not left


def test_there_are_117_tilings_by_tetrominoes():
    ways = tilings()
    assert len(ways) == len({frozenset(way) for way in ways}) == 117
    for way in ways:
        assert sorted(itertools.chain(*way)) == list(range(16))
        assert all(len(piece) == 4 and connected(piece) for piece in way)
    assert ways[0] == ((0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15))
    torch.testing.assert_close(
        bases() @ bases().transpose(1, 2), torch.eye(16, dtype=torch.float64).expand(117, 16, 16)
    )


@pytest.mark.parametrize("shape", [(4, 4), (8, 12), (3, 2, 16, 8)])
def test_tetrolets_reconstruct_exactly(shape):
    images = torch.randn(shape, dtype=torch.float64)
    low, high, tiling = tetrolet_transform(images)
    assert low.shape == (*shape[:-2], shape[-2] // 2, shape[-1] // 2)
    torch.testing.assert_close(inverse_tetrolet_transform(low, high, tiling), images)
    torch.testing.assert_close(low.square().sum() + high.square().sum(), images.square().sum())
    if min(low.shape[-2:]) >= 4 and low.shape[-1] % 4 == 0 and low.shape[-2] % 4 == 0:
        torch.testing.assert_close(inverse_tetrolet_transform(*tetrolet_transform(low)), low)


def test_the_tiling_is_the_best_of_all():
    blocks = torch.randn(20, 16, dtype=torch.float64)
    codes = Tetrolets().double().encode(blocks)
    cost = codes.values[:, 4:].abs().sum(1)
    every = torch.einsum("np,tcp->ntc", blocks, bases())[:, :, 4:].abs().sum(2)
    torch.testing.assert_close(cost, every.min(1).values)
    assert (every[:, 0] > cost + 1e-9).any()


def test_a_picture_of_pieces_needs_four_coefficients():
    for way in (tilings()[0], tilings()[50], tilings()[116]):
        block = torch.zeros(16, dtype=torch.float64)
        for level, piece in enumerate(way):
            block[list(piece)] = level + 1.0
        codes = Tetrolets(threshold=1e-9).double().encode(block)
        assert int(codes.l0()) == 4
        torch.testing.assert_close(codes.decode(Tetrolets().double().atoms), block)


def test_a_constant_picture_stays_an_image():
    low, high, tiling = tetrolet_transform(torch.ones(8, 8))
    assert torch.equal(low, 2 * torch.ones(4, 4))
    assert not high.any()
    assert not tiling.any()


def test_tetrolets_on_the_contract():
    blocks = torch.randn(2, 5, 16)
    coder = Tetrolets()
    torch.testing.assert_close(coder(blocks), blocks)
    coarse = Tetrolets(threshold=0.5)
    assert coarse.encode(blocks).l0().float().mean() < 16
    before = coarse(blocks)
    coarse.rescale(2.0)
    torch.testing.assert_close(coarse(2 * blocks), 2 * before)
    with pytest.raises(InputError, match=r"4 must divide a side \(6\), got 4"):
        tetrolet_transform(torch.ones(6, 8))


def test_bad_input():
    x, _ = sparse_data(20)
    with pytest.raises(InputError, match=r"coder must be one of cel0, fista, .*did you mean 'fista'"):
        SparseCoding(12, 18, "fistaa")
    with pytest.raises(InputError, match="k must be in"):
        KSVD(12, 18, 13)
    with pytest.raises(InputError, match="number of activations must be at least 18, got 5"):
        KSVD(12, 18, 3).fit(x[:5])
    with pytest.raises(InputError, match="activations must be finite"):
        KSVD(12, 18, 3).fit(x / 0)
    with pytest.raises(InputError, match="nonnegative must be False for omp"):
        OnlineLearning(12, 18, algorithm="omp", nonnegative=True)
    with pytest.raises(InputError, match="coder must have a penalty, got omp"):
        penalty_for(SparseCoding(12, 18, "omp"), x, 3.0)


def test_options_that_are_not_used_and_what_was_not_fit():
    assert SparseCoding(4, 16, "ista").k == OnlineLearning(8, 4).k == 8
    with pytest.raises(InputError, match="nonnegative must be False for lars"):
        OnlineLearning(4, 8, algorithm="lars", nonnegative=True)
    for unfit in (OnlineLearning(4, 8), SparseConceptCoding(4, 3, k=2), NMF(4, 8)):
        with pytest.raises(InputError, match="be fit first"):
            unfit.encode(torch.rand(2, 4))


def test_more_atoms_than_dimensions_factorise():
    x = torch.rand(60, 5, generator=torch.Generator().manual_seed(0))
    found = NMF(5, 12, seed=0)
    found.fit(x)
    assert float((found(x) - x).norm() / x.norm()) < 0.1


def test_penalties_follow_the_scale():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    found = OnlineLearning(6, 9, algorithm="lasso_lars", penalty=0.1)
    found.fit(x)
    before = found.encode(x).to_dense()
    found.rescale(10.0)
    torch.testing.assert_close(found.encode(10 * x).to_dense() / 10, before, atol=1e-3, rtol=1e-3)


def test_pursuit_sees_atoms_that_were_written_behind_its_back():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 16, generator=generator)
    found = MatchingPursuit(16, 200, 8, centre=False).eval()
    found(x)
    found.decoder.data.copy_(torch.nn.functional.normalize(torch.randn(200, 16, generator=generator), dim=1))
    torch.testing.assert_close(found(x), found.train()(x))


def test_ksvd_keeps_no_copies():
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(12, 16, generator=generator), dim=1)
    chosen = torch.stack([torch.randperm(12, generator=generator)[:2] for _ in range(400)])
    x = (torch.randn(400, 2, 1, generator=generator) * atoms[chosen]).sum(1)
    for seed in range(3):
        found = KSVD(16, 64, 3, seed=seed)
        history = found.fit(x, num_iterations=8)
        cosines = (found.atoms @ found.atoms.T).abs().triu(1)
        assert int((cosines > 0.99).sum()) <= 2
        assert history[-1] < 0.05
