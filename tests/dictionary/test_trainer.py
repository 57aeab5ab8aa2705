"""Training: exact resume, sweeps, scales that are folded away, and what is refused."""

import pytest
import torch
from pydantic import ValidationError

from paucity.checks import InputError, InputTypeError
from paucity.dictionary import checkpoint
from paucity.dictionary.batch_topk import BatchTopK
from paucity.dictionary.build import accepts, build
from paucity.dictionary.crosscoder import Crosscoder
from paucity.dictionary.files import load_dictionary, save_dictionary
from paucity.dictionary.jumprelu import JumpReLU
from paucity.dictionary.sae import SparseAutoencoder
from paucity.dictionary.sources import ActivationSource, TensorSource
from paucity.dictionary.topk import TopK
from paucity.dictionary.trainer import learning_rate_at, train

D, M = 5, 12
SHORT = {"num_tokens": 200, "batch_size": 20, "checkpoint_every": 3, "learning_rate": 1e-2}


def data(count=90, width=D, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 0.5


def make(rule=None, seed=0, **options):
    return SparseAutoencoder(D, M, rule or TopK(2), silent_after=60, seed=seed, **options)


def states(*each):
    return [value.clone() for one in each for value in one.state_dict().values()]


def same(first, second):
    assert len(first) == len(second) > 0
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Killed(Exception):
    pass


def kill_at(step):
    def tell(progress):
        if progress.step == step:
            raise Killed

    return tell


@pytest.mark.parametrize("stop", [2, 3, 7])
@pytest.mark.parametrize("rule", [TopK, BatchTopK, None])
def test_a_killed_training_goes_on_exactly(tmp_path, rule, stop):
    def fresh():
        made = [make(JumpReLU() if rule is None else rule(2), seed=seed, drawn_prefixes=seed) for seed in (0, 1)]
        with torch.no_grad():
            made[0].encoder_bias[:3] = -100.0  # silent from the start, and told so after 60 tokens
        return made

    whole = fresh()
    expected = train(whole, data(), **SHORT)
    assert not same(states(*whole), states(*fresh()))
    with pytest.raises(Killed):
        train(fresh(), data(), keep=tmp_path, on_progress=kill_at(stop), **SHORT)
    after = fresh()
    steps = []
    found = train(after, data(), keep=tmp_path, on_progress=lambda progress: steps.append(progress.step), **SHORT)
    assert same(states(*after), states(*whole))
    assert steps[0] == (stop - 1) // 3 * 3 + 1  # what is told is not yet written
    assert found.history == expected.history
    assert expected.history[-1].silent[0] > 0
    assert found.scale == expected.scale


def test_a_training_that_is_done_is_read_back(tmp_path):
    first, second, steps = make(), make(), []
    train(first, data(), keep=tmp_path, **SHORT)
    train(second, data(), keep=tmp_path, on_progress=steps.append, **SHORT)
    assert steps == []
    assert same(states(first), states(second))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    write, times = checkpoint.save_file, []

    def failing(tensors, path, metadata):
        times.append(path)
        if len(times) == 2:
            path.write_bytes(b"half")
            raise OSError("disk full")
        write(tensors, path, metadata)

    whole, after = make(), make()
    train(whole, data(), **SHORT)
    monkeypatch.setattr(checkpoint, "save_file", failing)
    with pytest.raises(OSError, match="disk full"):
        train(make(), data(), keep=tmp_path, **SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    steps = []
    train(after, data(), keep=tmp_path, on_progress=lambda progress: steps.append(progress.step), **SHORT)
    assert steps[0] == 4
    assert same(states(after), states(whole))


def test_many_train_as_each_alone():
    many = [make(TopK(k), seed=seed) for k, seed in ((1, 0), (3, 0), (3, 1))]
    found = train(many, data(), **SHORT)
    for number, (k, seed) in enumerate(((1, 0), (3, 0), (3, 1))):
        alone = make(TopK(k), seed=seed)
        single = train(alone, data(), **SHORT)
        for ours, theirs in zip(states(many[number]), states(alone), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert [each.l0[number] for each in found.history] == [each.l0[0] for each in single.history]
        assert [each.fvu[number] for each in found.history] == pytest.approx([each.fvu[0] for each in single.history])


@pytest.mark.parametrize("rule", [TopK(2), BatchTopK(2)])
def test_the_scale_of_activations_is_folded_away(rule):
    small, large = make(rule), make(type(rule)(2))
    train(small, data(), **SHORT)
    trained = train(large, 64 * data(), **SHORT)
    assert trained.scale == pytest.approx(D**0.5 / float(64 * data().norm(dim=1).mean()), rel=0.1)
    x = data(seed=1)
    torch.testing.assert_close(large.encode(64 * x).to_dense(), 64 * small.encode(x).to_dense(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(large(64 * x), 64 * small(x), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(large.decoder.norm(dim=1), torch.ones(M))
    assert not large.training


def test_the_offset_starts_at_the_mean():
    sae = make()
    train(sae, data(), **SHORT | {"num_tokens": 20, "learning_rate": 1e-9})
    mean = TensorSource(data()).sample(1024).mean(0)
    torch.testing.assert_close(sae.decoder_bias.detach(), mean, rtol=1e-4, atol=1e-5)
    plain = make()
    assert train(plain, data(), **SHORT | {"normalise": False, "centre": False, "learning_rate": 1e-9}).scale == 1
    torch.testing.assert_close(plain.decoder_bias.detach(), torch.zeros(D), rtol=0, atol=1e-6)


def test_training_finds_atoms():
    atoms = torch.eye(D)
    codes = torch.rand(2000, D, generator=torch.Generator().manual_seed(0)) + 0.5
    codes *= torch.rand(codes.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    sae = SparseAutoencoder(D, 2 * D, TopK(3))
    told = []
    train(sae, codes @ atoms, num_tokens=40_000, batch_size=200, learning_rate=1e-2, on_progress=told.append)
    assert told[-1].fvu[0] < 0.06 < 0.2 < told[0].fvu[0]  # 3 % of the rows have more than 3 atoms
    assert told[-1].step == told[-1].total == 200
    assert 1 < told[-1].l0[0] <= 3


def test_silence_is_counted_in_tokens():
    sae, told = make(auxiliary=0.0), []
    with torch.no_grad():
        sae.encoder_bias[:4] = -100.0
    train(sae, data(), on_progress=told.append, **SHORT)
    shares = [progress.silent[0] for progress in told]
    assert shares[:2] == [0, 0]
    assert shares[2] >= 4 / M


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate_at(step, 10, 0.2, 0.5) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert learning_rate_at(0, 1, 0.0, 0.0) == 1


class Spoilt(ActivationSource):
    input_size = D

    def batches(self, batch_size, *, start=0):
        for number in range(start, 100):
            x = data(batch_size, seed=number)
            x[0, 0] = torch.nan if number == 4 else x[0, 0]
            yield x


def test_bad_input(tmp_path):
    bad = data()
    bad[3, 2] = torch.nan
    with pytest.raises(InputError, match=r"TensorSource: activations must be finite, got NaN or infinity"):
        train(make(), bad, **SHORT)
    with pytest.raises(InputError, match=r"train: activations must be finite, got NaN or infinity in batch 4"):
        train(make(), Spoilt(), **SHORT)
    with pytest.raises(InputError, match=r"train: activations must be 5 wide like the dictionary, got 6"):
        train(make(), data(width=6), **SHORT)
    with pytest.raises(InputError, match=r"activations must hold at least one row, got shape \[0, 5\]"):
        train(make(), data()[:0], **SHORT)
    with pytest.raises(InputError, match=r"train: dictionary must hold at least one, got none"):
        train([], data(), **SHORT)
    with pytest.raises(InputTypeError, match=r"activations must be a tensor or an ActivationSource, got list"):
        train(make(), [1.0], **SHORT)
    with pytest.raises(ValidationError, match="num_token\n"):
        train(make(), data(), num_token=3)
    with pytest.raises(InputError, match=r"learning_rate must keep the loss finite"):
        train(make(), data(), **SHORT | {"learning_rate": 1e30, "clip_norm": None})
    train(make(), data(), keep=tmp_path, **SHORT)
    for other in (make(TopK(3)), make(seed=4), SparseAutoencoder(D, M + 1, TopK(2))):
        with pytest.raises(InputError, match=r"keep must hold a checkpoint of the same training, got another in"):
            train(other, data(), keep=tmp_path, **SHORT)


def test_products_in_bfloat16_train_about_as_well():
    rules = (BatchTopK(2), JumpReLU(), TopK(2))
    whole, half = ([make(type(rule)(**rule.settings())) for rule in rules] for _ in range(2))
    expected = train(whole, data(), **SHORT)
    found = train(half, data(), precision="bfloat16", **SHORT)
    assert all(value.dtype == torch.float32 for value in states(*half))
    assert found.history[-1].fvu == pytest.approx(expected.history[-1].fvu, rel=0.1)
    assert not same(states(*whole[:2]), states(*half[:2]))
    assert same(states(whole[2]), states(half[2]))  # chosen exactly in either


LOUD = {"num_tokens": 4000, "batch_size": 100, "learning_rate": 1e-2}


@pytest.mark.parametrize("method", ["relu_sae", "gated_sae", "jumprelu_sae", "batch_topk_sae", "topk_sae", "mp_sae"])
def test_a_second_training_goes_on_from_the_first(method, tmp_path):
    """Whatever the scale of the activations is, and from a file too."""
    x = 50 * data(400) + 20
    first = build(method, D, M, {"seed": 1} | ({"k": 3} if accepts(method, "k") else {}))
    end = train(first, x, **LOUD).history[-1].fvu[0]
    save_dictionary(first, tmp_path / "kept")
    before = [value.clone() for value in first.parameters()]
    for one in (first, load_dictionary(tmp_path / "kept")):
        still = train(one, x, **LOUD | {"learning_rate": 1e-12, "num_tokens": 100})
        assert still.history[0].fvu[0] == pytest.approx(end, rel=0.3, abs=0.02)
        for a, b in zip(one.parameters(), before, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_crosscoder_starts_at_the_mean():
    x = data(200) + 20
    started = train(Crosscoder((2, 3), M), x, **SHORT | {"learning_rate": 1e-12}).history[0].fvu[0]
    assert started < 3
    assert train(Crosscoder((2, 3), M), x, **SHORT | {"centre": False}).history[0].fvu[0] > 10


def test_dtypes_that_are_trained():
    exact = make().double()
    train(exact, data().double(), **SHORT)
    assert exact.decoder.dtype == torch.float64
    with pytest.raises(InputError, match="be float32 or float64"):
        train(make().bfloat16(), data(), **SHORT)
    with pytest.raises(InputError, match="all alike"):
        train([make(), make().double()], data(), **SHORT)
