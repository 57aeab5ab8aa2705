"""The rules of special encoders against the papers by loops, and their gradients against dense autograd in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from paucity.checks import InputError
from paucity.dictionary.abs_topk import AbsTopK
from paucity.dictionary.base import Batch
from paucity.dictionary.feature_choice import FeatureChoice, feature_shares
from paucity.dictionary.gradient_topk import GradientTopK, influence
from paucity.dictionary.mutual_choice import MutualChoice
from paucity.dictionary.sae import SparseAutoencoder
from paucity.dictionary.top_afa import TopAFA
from paucity.dictionary.topk import TopK
from paucity.dictionary.usage import Usage, under_used, zipf_fit
from paucity.dictionary.variational import Variational

from .test_special_rules import batch_of, check_gradients, dense_loss, make


def pre(sae, x):
    return F.linear(x - sae.decoder_bias, sae.encoder, sae.encoder_bias)


def best(scores, k):
    """Positions of the ``k`` highest, the first of equal ones, by a loop."""
    left, found = list(scores), []
    for _ in range(k):
        at = max(range(len(left)), key=lambda i: (left[i], -i))
        found.append(at)
        left[at] = -math.inf
    return found


def row_mask(scores, k):
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, each in enumerate(scores.tolist()):
        mask[row, best(each, k)] = True
    return mask


def test_abs_topk():
    sae, batch = make(AbsTopK(3), silent_after=5), batch_of()
    u = pre(sae, batch.x)
    kept = row_mask(u.abs(), 3)
    torch.testing.assert_close(sae.encode(batch.x).to_dense(), u * kept)
    silent = Batch(batch.x, batch.x, torch.arange(20) % 10, 0, 1)
    check_gradients(sae, silent, lambda s, b: dense_loss(s, b, pre(s, b.x) * kept, b.silent >= 5))


def test_abs_topk_revives_by_magnitude_and_with_sign():
    """The only silent atom points away from what is missing: only a negative value helps."""
    sae = SparseAutoencoder(2, 2, AbsTopK(1), silent_after=1, k_aux=1, auxiliary=1.0)
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor([[5.0, 0.0], [0.0, -1.0]]))
        sae.decoder.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    x = torch.tensor([[1.0, 1.0]])
    parts = sae.objective(Batch(x, x, torch.tensor([0, 1]), 0, 1)).parts
    # Error is (1 - 5, 1); the silent atom gives -1 * (0, -1) = (0, 1) of it, and 16 is left.
    assert float(parts["auxiliary"].detach()) == pytest.approx(16.0)


def mutual_mask(u, k):
    flat = best(u.clamp_min(0).flatten().tolist(), k * len(u))
    mask = torch.zeros(u.numel(), dtype=torch.bool)
    mask[flat] = True
    return mask.view(u.shape) & (u > 0)


@pytest.mark.parametrize("margin", [0.0, 0.8])
def test_mutual_choice(margin):
    sae, batch = make(MutualChoice(3, margin=margin), silent_after=5), batch_of(silent=4)
    kept = mutual_mask(pre(sae, batch.x), 3)
    assert int(kept.sum()) == 48
    density = kept.double().mean(0)
    under = under_used(density, margin).nonzero().flatten().tolist() if margin else []
    assert len(under) > 3 or not margin
    auxiliary = torch.zeros(20, dtype=torch.bool)
    auxiliary[sorted(under, key=lambda atom: (float(density[atom]), atom))[:3]] = True  # k_aux is 3
    check_gradients(sae, batch, lambda s, b: dense_loss(s, b, pre(s, b.x).relu() * kept, auxiliary))
    lowest = float(pre(sae, batch.x)[kept].min().detach())
    after = pre(sae, batch_of(seed=5).x)
    found = sae.encode(batch_of(seed=5).x).to_dense()
    torch.testing.assert_close(found, after * (after > lowest))


@pytest.mark.parametrize("exponent", [0.0, 0.7])
def test_feature_choice(exponent):
    sae, batch = make(FeatureChoice(3, exponent=exponent, margin=0.0)), batch_of()
    u = pre(sae, batch.x)
    wanted = mutual_mask(u, 3).sum(0).tolist()
    shares = feature_shares(48, 20, 16, exponent).tolist()
    kept, lowest = torch.zeros_like(u, dtype=torch.bool), torch.zeros(20, dtype=u.dtype)
    for rank, atom in enumerate(best(wanted, 20)):
        rows = [row for row in best(u[:, atom].tolist(), shares[rank]) if u[row, atom] > 0]
        kept[rows, atom] = True
        if rows:
            left = [max(0.0, float(u[row, atom].detach())) for row in range(16) if row not in rows]
            lowest[atom] = (min(u[row, atom] for row in rows) + max(left, default=0.0)) / 2
    assert sae.rule.train_codes(sae, batch).codes.to_dense().ne(0).equal(kept)
    sae = make(FeatureChoice(3, exponent=exponent, margin=0.0))
    check_gradients(sae, batch, lambda s, b: dense_loss(s, b, pre(s, b.x).relu() * kept))
    after = pre(sae, batch_of(seed=5).x)
    found = sae.encode(batch_of(seed=5).x).to_dense()
    torch.testing.assert_close(found, (after * (after > lowest)).relu())


def test_feature_choice_keeps_its_budget_on_single_rows():
    """With a share of about two entries, thresholds at the lowest value taken would leave a quarter of the budget."""
    sae = make(FeatureChoice(4, rate=0.02), dict_size=64)
    for step in range(200):
        sae.rule.train_codes(sae, batch_of(n=32, dict_size=64, seed=step, step=step))
    entries = sae.encode(batch_of(n=8192, dict_size=64, seed=999).x).l0().double().mean()
    assert float(entries) == pytest.approx(4, rel=0.06)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("total", "dict_size", "most"), [(48, 20, 16), (7, 20, 16), (999, 20, 16), (100, 7, 90)])
def test_feature_shares(total, dict_size, most, exponent):
    shares = feature_shares(total, dict_size, most, exponent)
    assert shares.sum() == min(max(total, dict_size), dict_size * most)
    assert shares.min() >= 1
    assert shares.max() <= most
    assert bool((shares.diff() <= 1).all())  # rounding may put one more at a lower rank
    if exponent == 0:
        assert shares.max() - shares.min() <= 1


def test_zipf():
    rank = torch.arange(1, 101, dtype=torch.float64)
    scale, exponent = zipf_fit(0.3 * rank[torch.randperm(100)] ** -0.8)
    assert scale == pytest.approx(0.3)
    assert exponent == pytest.approx(0.8)
    density = 0.3 * rank**-0.8
    density[60:] *= 0.05
    density[99] = 0
    found = under_used(density, 0.5)
    assert not found[:60].any()
    assert found[60:].all()
    assert not under_used(density[:60], 0.5).any()
    assert zipf_fit(torch.zeros(4)) == (0.0, 0.0)
    assert under_used(torch.zeros(4), 0.5).all()
    usage = Usage(0.5, 0.1)
    usage.attach(100)
    usage.density.copy_(density)
    silent = rank > 97
    assert torch.equal(usage.neglected(silent, 2), silent)  # the silent come first
    assert torch.equal(usage.neglected(silent, 5).nonzero().flatten(), torch.tensor([95, 96, 97, 98, 99]))
    assert torch.equal(usage.neglected(silent, 90), found)
    with pytest.raises(InputError, match="margin must be"):
        MutualChoice(3, margin=-1.0)


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_gradient_topk(beta):
    sae, batch = make(GradientTopK(3, beta=beta)), batch_of()
    u = pre(sae, batch.x)
    moved = torch.stack([torch.stack([(g @ atom).abs() for atom in sae.decoder]) for g in batch.gradient])
    torch.testing.assert_close(influence(sae, batch.gradient), moved)
    kept = row_mask(u.relu() * (1 + beta * moved / moved.mean()), 3) & (u > 0)
    check_gradients(sae, batch, lambda s, b: dense_loss(s, b, pre(s, b.x).relu() * kept))
    torch.testing.assert_close(sae.rule.codes_with_gradient(sae, batch.x, batch.gradient).to_dense(), u.relu() * kept)
    plain = make(TopK(3))
    assert torch.equal(sae.encode(batch.x).to_dense(), plain.encode(batch.x).to_dense())
    assert torch.equal(kept, row_mask(u, 3) & (u > 0)) == (beta == 0)


def test_top_afa():
    sae, batch = make(TopAFA(0.25), dict_size=40), batch_of(dict_size=40)
    u, norms = pre(sae, batch.x), (batch.x - sae.decoder_bias).norm(dim=1).tolist()
    kept = torch.zeros_like(u, dtype=torch.bool)
    for row, (each, norm) in enumerate(zip(u.relu().tolist(), norms, strict=True)):
        order = best(each, 40)
        gaps, total = [], 0.0
        for atom in order:
            total += each[atom] ** 2
            gaps.append(abs(math.sqrt(total) - norm))
        kept[row, order[: gaps.index(min(gaps)) + 1]] = True
    kept &= u > 0
    assert kept.sum(1).unique().numel() > 2
    torch.testing.assert_close(sae.encode(batch.x).to_dense(), u * kept)

    def dense(s, b):
        values = pre(s, b.x).relu() * kept
        gap = values.norm(dim=1) - (b.x - s.decoder_bias.detach()).norm(dim=1)
        return dense_loss(s, b, values) + 0.25 * 6 * gap.square().mean()

    check_gradients(sae, batch, dense)


@pytest.mark.parametrize("fixed", [0.0, 1.0, None])
def test_variational(fixed):
    rule = Variational(3, kl=0.3, warmup=0.5, deviation=fixed, seed=4)
    sae = make(rule)
    batch = batch_of(step=1)  # of 10: a second step of five to the full weight
    noise = torch.randn(16, 20, generator=torch.Generator().manual_seed(4 * 1_000_003 + 1), dtype=torch.float64)

    def deviation(s, x):
        if fixed is not None:
            return torch.full((16, 20), fixed, dtype=torch.float64)
        return (F.linear(x - s.decoder_bias, s.rule.encoder, s.rule.bias).clamp(-6, 2) / 2).exp()

    def dense(s, b):
        mean, spread = pre(s, b.x).relu(), deviation(s, b.x)
        z = mean + spread * noise
        normal = torch.distributions.Normal
        known = spread if fixed is None else torch.ones_like(spread)
        nats = torch.distributions.kl_divergence(normal(mean, known), normal(0, 1)).sum(1).mean()
        return dense_loss(s, b, z * row_mask(z.detach().abs(), 3)) + 0.3 * 0.4 * nats

    check_gradients(sae, batch, dense)
    other = rule.train_codes(sae, batch_of(step=2)).codes.to_dense()
    assert torch.equal(rule.train_codes(sae, batch).codes.to_dense() != 0, other != 0) == (fixed == 0)
    u = pre(sae, batch.x)
    torch.testing.assert_close(sae.encode(batch.x).to_dense(), u.relu() * row_mask(u, 3))
