"""The shared autoencoder: AuxK against loops, unit atoms, nested sizes, shapes, bad input."""

import json

import pytest
import torch
from torch.nn import functional as F

from paucity.checks import InputError, InputTypeError
from paucity.dictionary.abs_topk import AbsTopK
from paucity.dictionary.base import Batch
from paucity.dictionary.build import accepts, build, learned
from paucity.dictionary.sae import SparseAutoencoder, prefix
from paucity.dictionary.topk import TopK
from paucity.ops.formats import Codes

D, M, N, K = 6, 20, 13, 3


def make(rule=TopK, **options):
    sae = SparseAutoencoder(D, M, rule(K), **options).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return sae


def batch(silent, **options):
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batch(x, options.get("target", x), torch.tensor(silent), 0, 10)


def naive_auxiliary(sae, data, reconstruction, silent, k_aux):
    """Gao et al., A.2, row by row."""
    total = 0.0
    for row, target, made in zip(data.x, data.target, reconstruction.detach(), strict=True):
        pre = sae.encoder @ (row - sae.decoder_bias) + sae.encoder_bias
        rank = [abs(float(value)) if sae.rule.signed else float(value) for value in pre.detach()]
        best = sorted(silent, key=lambda atom: -rank[atom])[:k_aux]
        found = sum((pre[atom] if sae.rule.signed else pre[atom].clamp_min(0)) * sae.decoder[atom] for atom in best)
        total = total + ((found - (target - made)) ** 2).sum()
    return total / len(data.x) * min(k_aux, len(silent)) / k_aux


@pytest.mark.parametrize("rule", [TopK, AbsTopK])
@pytest.mark.parametrize(("silent", "k_aux"), [([2, 5, 6, 11, 19], 2), ([7], 4), (list(range(20)), 5)])
def test_silent_atoms_learn_what_is_missed(rule, silent, k_aux):
    sae = make(rule, k_aux=k_aux, silent_after=100, auxiliary=0.25)
    data = batch([100 if atom in silent else 99 for atom in range(M)])
    found = sae.objective(data)
    expected = 0.25 * naive_auxiliary(sae, data, found.reconstruction, silent, k_aux)
    torch.testing.assert_close(found.parts["auxiliary"], expected)
    torch.testing.assert_close(found.loss, found.parts["error"] + found.parts["auxiliary"])
    names = [name for name, _ in sae.named_parameters()]
    wanted = torch.autograd.grad(expected, list(sae.parameters()))
    gradients = torch.autograd.grad(found.parts["auxiliary"], list(sae.parameters()))
    for name, gradient, value in zip(names, gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, value, msg=lambda text, name=name: f"{name}: {text}")
    living = [atom for atom in range(M) if atom not in silent]
    assert (gradients[names.index("decoder")][living] == 0).all()


def test_without_silent_atoms_there_is_no_such_loss():
    assert list(make(silent_after=100).objective(batch([99] * M)).parts) == ["error"]
    assert list(make(silent_after=100, auxiliary=0.0).objective(batch([100] * M)).parts) == ["error"]


def test_steps_keep_atoms_at_norm_one_and_do_not_push_along_them():
    sae = SparseAutoencoder(D, M, TopK(K))
    data = batch([0] * M)
    sae.objective(Batch(data.x.float(), data.x.float(), data.silent, 0, 10)).loss.backward()
    before = sae.decoder.grad.clone()
    sae.before_step()
    along = (sae.decoder.grad * sae.decoder).sum(1)
    torch.testing.assert_close(along, torch.zeros(M), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        sae.decoder.grad, before - (before * sae.decoder).sum(1, keepdim=True) * sae.decoder, atol=1e-6, rtol=1e-5
    )
    with torch.no_grad():
        sae.decoder.mul_(3)
    sae.after_step()
    torch.testing.assert_close(sae.decoder.detach(), F.normalize(sae.decoder.detach(), dim=1))


def test_an_atom_of_zeros_stays_finite():
    sae = SparseAutoencoder(D, M, TopK(K))
    with torch.no_grad():
        sae.decoder[4] = 0
    sae.after_step()
    assert sae.decoder.isfinite().all()


def test_codes_decode_by_hand():
    sae, data = make(), batch([0] * M)
    codes = sae.encode(data.x)
    for row, out in zip(range(N), sae.decode(codes), strict=True):
        by_hand = sae.decoder_bias.clone()
        for value, atom in zip(codes.values[row], codes.indices[row], strict=True):
            by_hand = by_hand + value * sae.decoder[int(atom)]
        torch.testing.assert_close(out, by_hand)
    torch.testing.assert_close(sae(data.x.view(1, N, D))[0], sae.decode(codes))


def test_a_transcoder_has_another_width_and_no_centre():
    sae = SparseAutoencoder(D, M, TopK(K), output_size=9)
    x, target = torch.randn(N, D), torch.randn(N, 9)
    assert sae(x).shape == (N, 9)
    found = sae.objective(Batch(x, target, torch.zeros(M, dtype=torch.int64), 0, 10))
    torch.testing.assert_close(found.loss, (sae(x) - target).square().sum(1).mean())
    pre = x @ sae.encoder.T + sae.encoder_bias
    torch.testing.assert_close(sae.encode(x).to_dense(), pre.relu().masked_fill(pre < pre.topk(K).values[:, -1:], 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_dtype_encodes(dtype):
    sae = SparseAutoencoder(D, M, TopK(K)).to(dtype)
    assert sae(torch.randn(4, D)).dtype == dtype
    assert sae.encode(torch.randn(2, 4, D)).values.shape == (2, 4, K)
    assert sae.encode(torch.randn(0, D)).values.shape == (0, K)


def test_a_prefix_is_the_part_on_the_first_atoms():
    codes = Codes(torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[0, 5, 2]]), 6)
    assert prefix(codes, 3).to_dense().tolist() == [[1, 0, 3, 0, 0, 0]]


def test_the_seed_and_the_settings_make_the_same():
    first, second, third = (SparseAutoencoder(D, M, TopK(K), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.decoder, second.decoder)
    assert not torch.equal(first.decoder, third.decoder)
    settings = json.loads(json.dumps(first.settings()))
    assert settings.pop("rule") == {"name": "topk:TopK", "k": K}
    again = SparseAutoencoder(rule=TopK(K), **settings)
    assert again.settings() == first.settings()
    assert torch.equal(again.encoder, first.encoder)


def test_bad_input():
    sae = SparseAutoencoder(D, M, TopK(K))
    with pytest.raises(InputError, match=r"SparseAutoencoder.encode: x must have shape \[4, 6\], got \[4, 7\]"):
        sae.encode(torch.randn(4, 7))
    with pytest.raises(InputTypeError, match=r"x must be floating point, got torch.int64"):
        sae.encode(torch.ones(4, D, dtype=torch.int64))
    with pytest.raises(InputError, match=r"TopK: k must be in \[1, 20\], got 21"):
        SparseAutoencoder(D, M, TopK(21))
    with pytest.raises(InputError, match=r"TopK: k must be at least 1, got 0"):
        TopK(0)
    with pytest.raises(InputError, match=r"SparseAutoencoder: dict_size must be at least 1, got 0"):
        SparseAutoencoder(D, 0, TopK(1))
    with pytest.raises(InputError, match=r"SparseAutoencoder: k_aux must be at least 1, got 0"):
        SparseAutoencoder(D, M, TopK(K), k_aux=0)
    with pytest.raises(InputError, match=r"SparseAutoencoder: auxiliary must be in \[0, inf\), got -1"):
        SparseAutoencoder(D, M, TopK(K), auxiliary=-1)
    with pytest.raises(InputError, match=r"prefixes must ascend within \(0, 20\), got \(20,\)"):
        SparseAutoencoder(D, M, TopK(K), prefixes=(20,))


def test_a_rule_belongs_to_one_autoencoder():
    rule = TopK(2)
    SparseAutoencoder(4, 8, rule)
    with pytest.raises(InputError, match="rule must be no other autoencoder's"):
        SparseAutoencoder(4, 16, rule)


@pytest.mark.parametrize("method", learned())
def test_what_is_not_finite_is_refused_and_seeds_are_of_the_atoms(method):
    few = {"k": 2} if accepts(method, "k") else {}
    first, second = (build(method, 4, 8, {"seed": seed} | few) for seed in (0, 1))
    x = torch.ones(3, 4)
    x[1, 2] = float("nan")
    with pytest.raises(InputError, match="x must be finite, got NaN"):
        first.encode(x)
    if accepts(method, "seed"):
        drawn = [next(value for name, value in one.named_parameters() if "coder" in name) for one in (first, second)]
        assert not torch.equal(*drawn)
