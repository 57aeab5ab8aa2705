"""What the rules of special encoders have in common, over one table."""

import pytest
import torch
from torch.nn import functional as F

from paucity.checks import InputError
from paucity.dictionary.abs_topk import AbsTopK
from paucity.dictionary.base import Batch
from paucity.dictionary.feature_choice import FeatureChoice
from paucity.dictionary.gradient_topk import GradientTopK
from paucity.dictionary.mutual_choice import MutualChoice
from paucity.dictionary.sae import SparseAutoencoder
from paucity.dictionary.sources import TensorSource
from paucity.dictionary.top_afa import TopAFA
from paucity.dictionary.topk import TopK
from paucity.dictionary.trainer import train
from paucity.dictionary.variational import Variational

RULES = {
    "abs_topk": lambda: AbsTopK(3),
    "mutual_choice": lambda: MutualChoice(3, margin=0.4),
    "feature_choice": lambda: FeatureChoice(3, exponent=0.5),
    "gradient_topk": lambda: GradientTopK(3, beta=2.0),
    "top_afa": lambda: TopAFA(0.25),
    "variational": lambda: Variational(3, kl=0.1),
    "variational_learned": lambda: Variational(3, kl=0.1, deviation=None),
}


def make(rule, d=6, dict_size=20, seed=0, dtype=torch.float64, **options):
    sae = SparseAutoencoder(d, dict_size, rule, seed=seed, **options).to(dtype)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
        sae.after_step()
    return sae


def batch_of(n=16, d=6, dict_size=20, seed=1, step=0, dtype=torch.float64, silent=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=dtype)
    gradient = torch.randn(n, d, generator=generator, dtype=dtype)
    return Batch(x, x, torch.full((dict_size,), silent), step, 10, gradient)


def dense_loss(sae, batch, values, auxiliary=None):
    """Error of dense codes ``[n, dict_size]``, and AuxK of the atoms ``auxiliary`` (a mask), by dense products."""
    reconstruction = values @ sae.decoder + sae.decoder_bias
    error = batch.target - reconstruction
    loss = error.square().sum(1).mean()
    if auxiliary is None or not auxiliary.any():
        return loss
    u = F.linear(batch.x - sae.decoder_bias, sae.encoder, sae.encoder_bias)
    u = u if sae.rule.signed else u.relu()
    rank = u.detach().abs() if sae.rule.signed else F.linear(batch.x - sae.decoder_bias, sae.encoder, sae.encoder_bias)
    k = min(sae.k_aux, int(auxiliary.sum()))
    at = rank.masked_fill(~auxiliary, -torch.inf).topk(k, dim=1).indices
    kept = torch.zeros_like(u).scatter(1, at, u.gather(1, at))
    missed = (kept @ sae.decoder - error.detach()).square().sum(1).mean()
    return loss + sae.auxiliary * missed * k / sae.k_aux


def gradients(loss, sae):
    found = torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(sae.parameters(), found, strict=True)]


def check_gradients(sae, batch, dense):
    """``dense(sae, batch) -> loss`` must equal the objective, and so must its gradients in every parameter."""
    loss = sae.objective(batch).loss
    wanted = dense(sae, batch)
    torch.testing.assert_close(loss, wanted)
    for ours, theirs in zip(gradients(loss, sae), gradients(wanted, sae), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", RULES)
def test_rows_are_encoded_each_for_itself(name):
    sae = make(RULES[name]())
    for step in range(3):
        sae.objective(batch_of(step=step, seed=step))
    x = batch_of(seed=9).x
    whole = sae.encode(x).to_dense()
    assert whole.abs().sum() > 0
    for row in range(len(x)):
        torch.testing.assert_close(sae.encode(x[row]).to_dense(), whole[row])
    assert bool((whole < 0).any()) == (name == "abs_topk")


@pytest.mark.parametrize("name", RULES)
def test_rescaled_dictionaries_do_the_same_to_larger_activations(name):
    sae = make(RULES[name]())
    for step in range(3):
        sae.objective(batch_of(step=step, seed=step))
    x = batch_of(seed=9).x
    before, out = sae.encode(x).to_dense(), sae(x)
    with torch.no_grad():
        sae.rule.rescale(1.0)
    sae.rescale(3.0)
    torch.testing.assert_close(sae.encode(3 * x).to_dense(), 3 * before)
    torch.testing.assert_close(sae(3 * x), 3 * out)


@pytest.mark.parametrize("name", RULES)
def test_nothing_as_wide_as_the_dictionary_is_kept_for_the_backward_pass(name):
    n, d, dict_size = 64, 8, 1024
    sae = make(RULES[name](), d, dict_size, dtype=torch.float32, silent_after=5)
    batch = batch_of(n, d, dict_size, dtype=torch.float32, silent=9, step=3)
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = sae.objective(batch).loss
    assert max(sizes) < n * dict_size / 2
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in sae.parameters())


@pytest.mark.parametrize("name", RULES)
def test_training_learns_and_repeats(name):
    generator = torch.Generator().manual_seed(3)
    atoms = F.normalize(torch.randn(16, 8, generator=generator), dim=1)
    codes = torch.rand(512, 16, generator=generator) * (torch.rand(512, 16, generator=generator) < 0.15)
    x = codes @ atoms
    source = TensorSource(x, gradients=torch.randn(512, 8, generator=generator))
    options = {"num_tokens": 64 * 60, "batch_size": 64, "learning_rate": 1e-2}
    found = []
    for _ in range(2):
        sae = SparseAutoencoder(8, 16, RULES[name](), silent_after=256)
        train(sae, source, **options)
        found.append(sae(x).detach())
    assert torch.equal(*found)
    fvu = float((found[0] - x).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu < (0.9 if name.startswith("variational") else 0.5)  # with noise as high as activations little is learned


@pytest.mark.parametrize("name", RULES)
def test_settings_make_the_same_rule(name):
    rule = RULES[name]()
    settings = rule.settings()
    again = type(rule)(**settings)
    assert again.settings() == settings
    sae, other = make(rule), make(again, seed=5)
    sae.objective(batch_of())
    other.load_state_dict(sae.state_dict())
    x = batch_of(seed=9).x
    assert torch.equal(sae(x), other(x))


@pytest.mark.parametrize("rule", [AbsTopK, MutualChoice, FeatureChoice, GradientTopK, Variational])
def test_fewer_atoms_than_k_are_refused(rule):
    with pytest.raises(InputError, match="k must be"):
        SparseAutoencoder(4, 8, rule(9))
    with pytest.raises(InputError, match="k must be"):
        rule(0)


def test_gradients_are_asked_for():
    sae = SparseAutoencoder(4, 8, GradientTopK(2))
    with pytest.raises(InputError, match="activations must come with gradients"):
        train(sae, torch.randn(32, 4), num_tokens=32, batch_size=32)
    with pytest.raises(InputError, match="gradient must be in the batch"):
        sae.objective(Batch(torch.randn(3, 4), torch.randn(3, 4), torch.zeros(8, dtype=torch.int64), 0, 1))
    with pytest.raises(InputError, match=r"gradients must have shape \[32, 4\]"):
        TensorSource(torch.randn(32, 4), gradients=torch.randn(32, 3))
    with pytest.raises(InputError, match="gradients must be finite"):
        TensorSource(torch.randn(32, 4), gradients=torch.full((32, 4), torch.nan))
    with pytest.raises(InputError, match="output_size must be the input_size"):
        SparseAutoencoder(4, 8, GradientTopK(2), output_size=5)


def test_gradients_come_with_their_rows():
    x = torch.randn(10, 4)
    for rows, _ in zip(TensorSource(x, gradients=2 * x).rows(6), range(4), strict=False):
        assert torch.equal(rows.gradient, 2 * rows.x)
    assert next(TensorSource(x).rows(6)).gradient is None


def test_signed_codes_count_as_alive_where_their_sum_is_zero():
    """Atoms of an orthogonal dictionary whose codes cancel over every batch are used all the time."""
    x = torch.eye(4).repeat(8, 1)
    x = torch.cat([x, -x])
    for rule, silent in ((AbsTopK(1), 0.0), (TopK(1), 0.0)):
        sae = SparseAutoencoder(4, 4, rule, silent_after=32, auxiliary=0.0)
        with torch.no_grad():
            sae.encoder.copy_(torch.eye(4))
            sae.decoder.copy_(torch.eye(4))
        options = {"num_tokens": 256, "batch_size": 64, "learning_rate": 1e-9, "normalise": False}
        assert train(sae, x, **options).history[-1].silent == (silent,)
        total = sae.encode(x).to_dense().sum(0)
        assert (total.abs() < 1e-5).all() == isinstance(rule, AbsTopK)
