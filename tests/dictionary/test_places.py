"""Transcoders and crosscoders: loops from the papers, gradients, planted atoms, files, pairs of a model, bad input."""

import pytest
import torch
from torch.nn import functional as F

from paucity.checks import InputError, InputTypeError
from paucity.dictionary.base import Batch
from paucity.dictionary.crosscoder import Crosscoder
from paucity.dictionary.files import load_dictionary, save_dictionary
from paucity.dictionary.gradient_topk import GradientTopK
from paucity.dictionary.live import live_source
from paucity.dictionary.relu import ReLU
from paucity.dictionary.sae import SparseAutoencoder
from paucity.dictionary.sources import TensorSource
from paucity.dictionary.topk import TopK
from paucity.dictionary.trainer import train
from paucity.dictionary.transcoder import Pairs, Transcoder, mlp_hooks, pairs_of
from paucity.models.vision import ViT

WIDTHS = (3, 5)


def rows(n, d, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moved(dictionary, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        dictionary.after_step()
    return dictionary.double()


def crosscoder(**options):
    made = moved(Crosscoder(WIDTHS, 7, l1=0.3, warmup=0.0, initial_norm=0.5, **options))
    made.scales.copy_(torch.tensor([2.0, 0.5]))
    return made


@torch.no_grad()
def test_crosscoder_matches_loops():
    made, x = crosscoder(), rows(6, 8)
    loss = 0.0
    for row, code in zip(x, made.encode(x).to_dense(), strict=True):
        parts, at = [], 0
        for scale, width in zip((2.0, 0.5), WIDTHS, strict=True):
            parts.append((slice(at, at + width), scale))
            at += width
        z = []
        for i in range(7):
            pre = made.encoder_bias[i] + sum(made.encoder[i, s] @ (row[s] * scale) for s, scale in parts)
            z.append(max(float(pre), 0.0))
        torch.testing.assert_close(code.tolist(), z)
        for s, scale in parts:
            made_of = made.decoder_bias[s] + sum(z[i] * made.decoder[i, s] for i in range(7))
            loss += float((row[s] * scale - made_of).square().sum())
            torch.testing.assert_close(made(row)[s], made_of / scale)
        loss += 0.3 * sum(z[i] * sum(float(made.decoder[i, s].norm()) for s, _ in parts) for i in range(7))
    batch = Batch(x, x, torch.zeros(7, dtype=torch.int64), 0, 10)
    assert float(made.objective(batch).loss) == pytest.approx(loss / 6)


def test_crosscoder_gradients():
    made, x = crosscoder(), rows(2, 8)
    silent = torch.zeros(7, dtype=torch.int64)
    names = [name for name, _ in made.named_parameters()]

    def loss(*values):
        with torch.nn.utils.stateless._reparametrize_module(made, dict(zip(names, values, strict=True))):
            return made.objective(Batch(x, x, silent, 0, 10)).loss

    assert torch.autograd.gradcheck(
        loss, [p.detach().clone().requires_grad_() for p in made.parameters()], fast_mode=True
    )


def test_rescaled_crosscoder_does_the_same_to_larger_activations():
    made, x = crosscoder(), rows(6, 8)
    out, codes = made(x), made.encode(x).to_dense()
    made.rescale(3.0)
    torch.testing.assert_close(made(3 * x), 3 * out)
    torch.testing.assert_close(made.encode(3 * x).to_dense(), 3 * codes)


def planted(seed=0):
    """Twelve atoms, three only at the first place, three only at the second, which is five times as loud."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (F.normalize(torch.randn(12, 10, generator=generator), dim=1) for _ in range(2))
    second[:3], first[9:] = 0, 0
    z = torch.rand(8000, 12, generator=generator) * (torch.rand(8000, 12, generator=generator) < 0.1)
    return first, second, z, torch.cat([z @ first, 5 * (z @ second)], 1)


def test_crosscoder_finds_whose_atoms_are():
    first, second, _, x = planted()
    made = Crosscoder((10, 10), 12, l1=0.5)
    made.fit(x, num_tokens=128 * 300, batch_size=128, learning_rate=2e-2)
    assert (made(x) - x).square().sum() < 0.02 * (x - x.mean(0)).square().sum()
    match = (
        F.normalize(made.atoms[:, :10], dim=1) @ first.T + F.normalize(made.atoms[:, 10:], dim=1) @ second.T
    ).argmax(0)
    belongs = made.relative_norms(0, 1)[match]
    assert belongs[:3].max() < 0.05
    assert belongs[9:].min() > 0.95
    assert (belongs[3:9] - 0.5).abs().max() < 0.1


def transcoder(rule=None):
    made = moved(Transcoder(4, 9, 3, rule or ReLU(0.5, warmup=0.0), auxiliary=0.0))
    made.gain.fill_(2.0)
    return made


@torch.no_grad()
def test_transcoder_matches_loops():
    made, x, y = transcoder(), rows(5, 4), rows(5, 3, seed=2)
    sae, loss = made.sae, 0.0
    for row, target in zip(x, y, strict=True):
        z = [max(float(sae.encoder[i] @ (2 * row) + sae.encoder_bias[i]), 0.0) for i in range(9)]
        out = sae.decoder_bias + sum(z[i] * sae.decoder[i] for i in range(9))
        torch.testing.assert_close(made(row), out)
        loss += float((target - out).square().sum()) + 0.5 * sum(z)
    batch = Batch(x, y, torch.zeros(9, dtype=torch.int64), 0, 10)
    assert float(made.objective(batch).loss) == pytest.approx(loss / 5)


def test_transcoder_learns_what_is_made_of_the_input():
    first, _, z, _ = planted()
    z = z[:, :9]
    y = 30 * z @ torch.randn(9, 7, generator=torch.Generator().manual_seed(1)) + 4
    x = z @ first[:9]
    made = Transcoder(10, 9, 7, TopK(4))
    told = made.fit(pairs_of(x, y), num_tokens=256 * 400, batch_size=256, learning_rate=1e-2)
    left = float((made(x).detach() - y).square().sum() / (y - y.mean(0)).square().sum())
    assert left < 0.1
    assert told.history[-1].fvu[0] == pytest.approx(left, abs=0.03)
    assert float(made.gain) > 10
    assert (made.atoms.norm(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("make", [crosscoder, transcoder])
def test_files_keep_all(tmp_path, make):
    made = make().float()
    x = rows(4, made.input_size, dtype=torch.float32)
    save_dictionary(made, tmp_path / "kept")
    again = load_dictionary(tmp_path / "kept")
    assert type(again) is type(made)
    assert again.settings() == made.settings()
    assert torch.equal(again(x), made(x))


def test_pairs_of_a_model():
    model = ViT(depth=2, dim=8, heads=2, patch_size=7)
    items = list(rows(3, 784, dtype=torch.float32).view(3, 1, 1, 28, 28))
    hooks = mlp_hooks(model, 1)
    source = Pairs(live_source(model, hooks, items, capacity=32), 8)
    pair = next(source.rows(20))
    torch.testing.assert_close(model.blocks[1].mlp(pair.x), pair.target)
    assert (source.input_size, source.output_size) == (8, 8)
    with pytest.raises(InputError, match=r"mlp\.7"):
        mlp_hooks(model, 7)


def test_targets_come_with_their_rows_and_are_wanted():
    x = rows(30, 4)
    for pair, _ in zip(pairs_of(x, 2 * x[:, :3]).rows(7), range(6), strict=False):
        assert torch.equal(pair.target, 2 * pair.x[:, :3])
    options = {"num_tokens": 32, "batch_size": 16}
    with pytest.raises(InputError, match="activations must come with targets 3 wide"):
        train(Transcoder(4, 8, 3), TensorSource(x.float()), **options)
    with pytest.raises(InputError, match="activations must come with targets 4 wide"):
        train(SparseAutoencoder(4, 8, TopK(2)), pairs_of(x, x[:, :3]), **options)
    with pytest.raises(InputError, match="pairs must come with targets"):
        Transcoder(4, 8).fit(x)
    with pytest.raises(InputError, match="not 0 throughout"):
        Transcoder(4, 8).fit(pairs_of(x, 0 * x))


def test_bad_input():
    with pytest.raises(InputTypeError, match="rule must be a Rule, got str"):
        Transcoder(4, 8, rule="topk")
    with pytest.raises(InputError, match="rule must need no gradients"):
        Transcoder(4, 8, rule=GradientTopK(2))
    with pytest.raises(InputError, match="input_size must be"):
        Pairs(rows(3, 4), 4)
    with pytest.raises(InputError, match=r"y must have shape \[3, any\], got \[2, 4\]"):
        pairs_of(rows(3, 4), rows(2, 4))
    with pytest.raises(InputError, match="widths must hold at least one place"):
        Crosscoder((), 8)
    with pytest.raises(InputError, match=r"be 8 wide \(sum of widths\), got 7"):
        Crosscoder(WIDTHS, 8).fit(rows(3, 7))
    with pytest.raises(InputError, match="not 0 at a whole place"):
        Crosscoder(WIDTHS, 8).fit(torch.cat([rows(3, 3), 0 * rows(3, 5)], 1))
    with pytest.raises(InputError, match="second must be"):
        Crosscoder(WIDTHS, 8).relative_norms(0, 2)
