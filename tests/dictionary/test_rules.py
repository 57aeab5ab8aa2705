"""ReLU, Gated, JumpReLU, BatchTopK and Matryoshka: losses and gradients of a dense autograd, in float64."""

import pytest
import torch
from torch.nn import functional as F

from paucity.checks import InputError
from paucity.dictionary.base import Batch
from paucity.dictionary.batch_topk import BatchTopK, batch_topk
from paucity.dictionary.gated import Gated
from paucity.dictionary.jumprelu import JumpReLU
from paucity.dictionary.matryoshka import matryoshka_sae
from paucity.dictionary.relu import ReLU
from paucity.dictionary.rules import above, warmed
from paucity.dictionary.sae import SparseAutoencoder
from paucity.dictionary.topk import TopK
from paucity.ops.select import global_topk_mask, threshold_mask

D, M, N = 6, 20, 17
RULES = {
    "relu": lambda: ReLU(0.7, warmup=0.0),
    "gated": lambda: Gated(0.7, warmup=0.0),
    "jumprelu": lambda: JumpReLU(0.3, initial=0.2, bandwidth=0.3, warmup=0.0),
    "batch_topk": lambda: BatchTopK(3),
    "topk": lambda: TopK(3),
}


def make(name, **options):
    torch.manual_seed(5)
    sae = SparseAutoencoder(D, M, RULES[name](), **options).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return sae


def batch(*, dtype=torch.float64, seed=0, step=10):
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return Batch(x, x, torch.zeros(M, dtype=torch.int64), step, 100)


class Step(torch.autograd.Function):
    """The paper's step and JumpReLU on dense tensors."""

    @staticmethod
    def forward(ctx, u, theta, eps):
        ctx.save_for_backward(u, theta)
        ctx.eps = eps
        return (u > theta).to(u)

    @staticmethod
    def backward(ctx, grad):
        u, theta = ctx.saved_tensors
        kernel = (((u - theta) / ctx.eps).abs() < 0.5).to(u)
        return None, -(kernel / ctx.eps * grad).sum(0), None


class Jump(Step):
    @staticmethod
    def forward(ctx, u, theta, eps):
        return u * Step.forward(ctx, u, theta, eps)

    @staticmethod
    def backward(ctx, grad):
        u, theta = ctx.saved_tensors
        kernel = (((u - theta) / ctx.eps).abs() < 0.5).to(u)
        return (u > theta) * grad, -(theta / ctx.eps * kernel * grad).sum(0), None


def naive_loss(sae, x):
    """The papers' losses on dense codes."""
    centred = x - sae.decoder_bias if sae.centre else x
    linear = centred @ sae.encoder.T
    pre, rule, added = linear + sae.encoder_bias, sae.rule, 0.0
    if isinstance(rule, ReLU):
        codes = pre.relu()
        added = rule.l1 * codes.sum(1).mean()
    elif isinstance(rule, Gated):
        codes = (pre > 0) * (linear * rule.log_gain.exp() + rule.magnitude_bias).relu()
        frozen = pre.relu() @ sae.decoder.detach() + sae.decoder_bias.detach()
        added = rule.l1 * pre.relu().sum(1).mean() + ((frozen - x) ** 2).sum(1).mean()
    elif isinstance(rule, JumpReLU):
        codes = Jump.apply(pre, rule.threshold, rule.bandwidth)
        added = rule.l0 * Step.apply(pre, rule.threshold, rule.bandwidth).sum(1).mean()
    elif isinstance(rule, BatchTopK):
        flat = pre.relu().flatten()
        chosen = flat.topk(rule.k * len(x)).indices
        codes = torch.zeros_like(flat).scatter(0, chosen, flat[chosen]).view_as(pre)
    else:
        chosen = pre.topk(rule.k).indices
        codes = torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen).relu())
    sizes = (*sae.prefixes, M)
    errors = [((codes[:, :m] @ sae.decoder[:m] + sae.decoder_bias - x) ** 2).sum(1).mean() for m in sizes]
    return sum(errors) / len(errors) + added, codes


@pytest.mark.parametrize("prefixes", [(), (4, 11)])
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_loss_and_gradients_are_those_of_dense_codes(name, centre, prefixes):
    sae, data = make(name, centre=centre, prefixes=prefixes), batch()
    expected, dense = naive_loss(sae, data.x)
    wanted = torch.autograd.grad(expected, list(sae.parameters()))
    found = sae.objective(data)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.codes.to_dense(), dense)
    for (what, _), gradient, value in zip(
        sae.named_parameters(), torch.autograd.grad(found.loss, list(sae.parameters())), wanted, strict=True
    ):
        assert value.abs().sum() > 0, what
        torch.testing.assert_close(gradient, value, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("name", RULES)
def test_the_kernels_in_float32_give_the_same(name):
    sae, data = make(name), batch()
    expected = torch.autograd.grad(naive_loss(sae, data.x)[0], list(sae.parameters()))
    narrow = make(name).float()
    found = torch.autograd.grad(narrow.objective(batch(dtype=torch.float32)).loss, list(narrow.parameters()))
    for gradient, value in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, value.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", RULES)
def test_a_row_is_encoded_for_itself(name):
    sae, data = make(name), batch()
    if name == "batch_topk":
        sae.objective(data)
        assert sae.rule.threshold > 0
    together = sae.encode(data.x.view(1, N, D)).to_dense()[0]
    alone = torch.stack([sae.encode(row).to_dense() for row in data.x])
    torch.testing.assert_close(together, alone)
    assert (together >= 0).all()
    assert sae.encode(data.x[:0]).to_dense().shape == (0, M)


@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu", "topk"])
def test_encoding_is_what_training_sees(name):
    sae, data = make(name), batch()
    torch.testing.assert_close(sae.encode(data.x).to_dense(), naive_loss(sae, data.x)[1])


@pytest.mark.parametrize("factor", [0.25, 8.0])
@pytest.mark.parametrize("name", RULES)
def test_rescaled_it_treats_larger_activations_as_the_first(name, factor):
    sae, data = make(name), batch()
    if name == "batch_topk":
        sae.objective(data)
    codes, out = sae.encode(data.x).to_dense(), sae(data.x)
    sae.rescale(factor)
    torch.testing.assert_close(sae.encode(factor * data.x).to_dense(), factor * codes)
    torch.testing.assert_close(sae(factor * data.x), factor * out)


def test_jumprelu_thresholds_stay_at_zero_or_above():
    sae = make("jumprelu")
    with torch.no_grad():
        sae.rule.threshold -= 1
    assert (sae.encode(batch().x).values >= 0).all()
    sae.after_step()
    assert (sae.rule.threshold == 0).all()


@pytest.mark.parametrize("k", [1, 3, 12, 20])
def test_batch_topk_is_a_sort_of_the_whole_batch(k):
    for seed in range(5):
        score = torch.randn(9, M, generator=torch.Generator().manual_seed(seed)).mul(3).round()  # many ties
        score[0] += 10  # one row takes all it can
        indices, used = batch_topk(score, k)
        found = torch.zeros_like(score, dtype=torch.bool).scatter(1, indices.long(), used)
        assert torch.equal(found, global_topk_mask(score, k=9 * k))
        assert used.any(0).all()


def test_the_threshold_of_batch_topk_is_the_mean_of_the_lowest_kept():
    sae, lowest = make("batch_topk"), []
    for step in range(5):
        data = batch(seed=step, step=step)
        codes = naive_loss(sae, data.x)[1]
        sae.objective(data)
        lowest.append(codes[codes > 0].min())
    torch.testing.assert_close(sae.rule.threshold, torch.stack(lowest).mean().to(sae.rule.threshold))
    with torch.no_grad():
        sae.encoder_bias -= 100
    before = sae.rule.threshold.clone()
    assert sae.objective(batch(step=9)).codes.l0().sum() == 0
    assert torch.equal(sae.rule.threshold, before)


def test_encoding_keeps_about_k_after_training():
    x = torch.randn(1000, D, generator=torch.Generator().manual_seed(0))
    sae = SparseAutoencoder(D, M, BatchTopK(3))
    sae.fit(x, num_tokens=20_000, batch_size=200, learning_rate=1e-2)
    l0 = sae.encode(x).l0()
    assert abs(float(l0.float().mean()) - 3) < 0.5
    assert len(l0.unique()) > 2


def test_penalties_warm_up():
    data = [Batch(torch.ones(1, D), torch.ones(1, D), torch.zeros(M), step, 100) for step in (0, 9, 19, 50)]
    assert [warmed(each, 0.2) for each in data] == [0.05, 0.5, 1.0, 1.0]
    assert warmed(data[0], 0.0) == 1.0
    sae = SparseAutoencoder(D, M, ReLU(0.7, warmup=1.0))
    parts = [float(sae.objective(batch(dtype=torch.float32, step=step)).parts["l1"].detach()) for step in (24, 49)]
    assert parts[1] == pytest.approx(2 * parts[0])


@pytest.mark.parametrize("width", [1, 300, 1000])
def test_above_finds_all_of_a_row(width):
    score = torch.randn(7, width)
    score[3], score[4] = 1.0, -1.0
    indices, used = above(score, 0.1)
    times = torch.zeros(score.shape, dtype=torch.int64).scatter_add(1, indices.long(), used.long())
    assert torch.equal(times, threshold_mask(score, 0.1).long())
    assert used.shape[1] == width
    assert above(score[:0])[1].shape == (0, 1)


def test_drawn_prefixes_are_many_sizes_and_the_same_in_a_resumed_step():
    sae = matryoshka_sae(D, 400, k=3, drawn_prefixes=9, seed=3)
    drawn = [sae._sizes(step) for step in range(200)]
    assert drawn[7] == sae._sizes(7) != drawn[8]
    assert all(len(set(sizes)) == 9 and set(sizes) <= set(range(1, 400)) for sizes in drawn)
    share = torch.tensor(drawn).le(100).double().mean()  # of sqrt(m) it would be sqrt(100 / 400)
    assert 0.45 < share < 0.55


def test_matryoshka_puts_what_is_general_first():
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(8000, 2, generator=generator).abs() * 3
    rare = torch.rand(8000, 4, generator=generator) * (torch.rand(8000, 4, generator=generator) < 0.1)
    x = torch.cat([strong, rare], 1)
    nested = matryoshka_sae(D, 8, k=3, prefixes=(2,), auxiliary=0.0)
    plain = SparseAutoencoder(D, 8, BatchTopK(3), auxiliary=0.0)
    for sae in (nested, plain):
        sae.fit(x, num_tokens=40_000, batch_size=400, learning_rate=2e-2)

    @torch.no_grad()
    def of_the_first(sae):
        first = sae.encode(x).to_dense()[:, :2] @ sae.decoder[:2] + sae.decoder_bias
        return float((first - x).square().sum(1).mean())

    assert of_the_first(nested) < 0.5 * of_the_first(plain)


def test_bad_input():
    with pytest.raises(InputError, match=r"BatchTopK: k must be in \[1, 20\], got 21"):
        SparseAutoencoder(D, M, BatchTopK(21))
    with pytest.raises(InputError, match=r"ReLU: l1 must be in \[0, inf\), got -1"):
        ReLU(-1)
    with pytest.raises(InputError, match=r"JumpReLU: bandwidth must be in \(0, inf\), got 0"):
        JumpReLU(bandwidth=0)
    with pytest.raises(InputError, match=r"Gated: warmup must be in \[0, 1\], got 2"):
        Gated(warmup=2)
    with pytest.raises(InputError, match=r"prefixes must ascend within \(0, 20\), got \(4, 4\)"):
        SparseAutoencoder(D, M, TopK(3), prefixes=(4, 4))
    with pytest.raises(InputError, match=r"drawn_prefixes must be in \[0, 0\], got 2"):
        matryoshka_sae(D, M, k=3, prefixes=(4,), drawn_prefixes=2)


def test_unit_atoms_make_the_weight_of_l1_one():
    sae = SparseAutoencoder(D, M, ReLU(0.5, warmup=0.0))
    data = batch(dtype=torch.float32)
    codes = sae.objective(data).codes.to_dense()
    weighted = 0.5 * (codes * sae.decoder.norm(dim=1)).sum(1).mean()
    torch.testing.assert_close(sae.objective(data).parts["l1"], weighted)
    torch.testing.assert_close(sae.decoder, F.normalize(sae.decoder, dim=1))
