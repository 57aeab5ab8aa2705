"""Dictionaries on a model: trained, resumed after a kill, judged, in force as a step; and what is refused."""

import itertools
import math
from functools import partial

import pytest
import torch

from paucity.checks import InputError
from paucity.dictionary import archetypal
from paucity.dictionary import job as job_module
from paucity.dictionary.apply import apply_step, options_for
from paucity.dictionary.build import accepts, build, learned
from paucity.dictionary.files import load_dictionary
from paucity.dictionary.job import Options, fit_on, middle_hook, text_windows
from paucity.dictionary.judge import judge
from paucity.dictionary.live import live_source
from paucity.dictionary.sae import SparseAutoencoder
from paucity.dictionary.topk import TopK
from paucity.models.harvest import harvest
from paucity.models.load import Loaded, byte_tokenizer
from paucity.models.places import find_hook

OPTIONS = {"dict_size": (48,), "k": (4,), "num_tokens": 320, "batch_size": 32, "capacity": 64}


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def items():
    return list(torch.randint(3, 64, (6, 1, 20), generator=torch.Generator().manual_seed(1)))


def fitted(model, items, keep=None, **changes):
    return fit_on(model, "topk_sae", Options(**(OPTIONS | changes)), items, source="tiny", texts="random", keep=keep)


def weights(found):
    return [value for one in found for value in one.dictionary.state_dict().values()]


def test_a_sweep_at_several_places(model, items, tmp_path):
    found = fitted(model, items, tmp_path, hooks=("residual.0", "heads.1.2"), dict_size=(48, 64), seeds=(0, 1))
    assert [one.name for one in found[:4]] == [
        f"residual.0-size{size}-seed{seed}" for size, seed in itertools.product((48, 64), (0, 1))
    ]
    assert [one.dictionary.input_size for one in found] == [32] * 4 + [8] * 4
    assert found[0].options == {"k": 4, "seed": 0, "silent_after": 40}
    assert all(len(one.trained.history[-1].fvu) == 4 for one in found)
    live = fitted(model, items, hooks=("residual.0",), live=True, dict_size=(48, 64), seeds=(0, 1))
    for one, other in zip(weights(found[:4]), weights(live), strict=True):  # from disk in bf16, or straight
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)


def test_a_job_that_was_killed_gives_the_same(model, items, tmp_path, monkeypatch):
    whole = fitted(model, items, tmp_path / "whole", hooks=("residual.0", "mlp.1"))
    steps = []

    class Killed(Exception):
        pass

    train = job_module.train

    def train_and_die(*args, on_progress, **options):
        def tell(progress):
            on_progress(progress)
            steps.append(progress.step)
            if len(steps) == 14:  # in the middle of the second place
                raise Killed

        return train(*args, on_progress=tell, checkpoint_every=3, **options)

    monkeypatch.setattr(job_module, "train", train_and_die)
    with pytest.raises(Killed):
        fitted(model, items, tmp_path / "killed", hooks=("residual.0", "mlp.1"))
    resumed = fitted(model, items, tmp_path / "killed", hooks=("residual.0", "mlp.1"))
    assert steps[14:] == [4, 5, 6, 7, 8, 9, 10]  # the first place is done; the second goes on behind a checkpoint
    for one, other in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(one, other)


def test_activations_of_something_else_are_not_trained_on(model, items, tmp_path):
    first = fitted(model, items, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(fitted(model, items, tmp_path)), strict=True))
    other = "resume must continue a run of the same plan, got another in .*activations"
    with pytest.raises(InputError, match=other):
        fitted(model, items[:5], tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    with pytest.raises(InputError, match=other):
        fitted(model, items, tmp_path)


@pytest.mark.parametrize("method", ["archetypal_sae", "mp_sae"])
def test_what_fits_itself_is_fit_as_from_python(model, items, method, monkeypatch):
    few = partial(archetypal.kmeans_centroids, num_tokens=128)
    monkeypatch.setattr(archetypal, "kmeans_centroids", few)
    options = Options(**(OPTIONS | {"dict_size": (12,), "num_tokens": 64, "hooks": ("residual.0",), "k": (2, 3)}))
    found = fit_on(model, method, options, items, source="tiny", texts="random")
    assert [one.name for one in found] == ["residual.0-k2", "residual.0-k3"]
    alone = build(method, 32, 12, {"k": 3, "seed": 0})
    stream = live_source(model, "residual.0", items, capacity=64)
    alone.fit(stream, num_tokens=64, batch_size=32, learning_rate=1e-3)
    for name, value in alone.state_dict().items():
        assert torch.equal(found[1].dictionary.state_dict()[name], value)


class Perfect(SparseAutoencoder):
    """Gives back what it is given."""

    def forward(self, x):
        return x


def test_judging_by_definition(model, items):
    dictionary = SparseAutoencoder(32, 16, TopK(3))
    figures = judge(model, "residual.0", dictionary, items, skip_ids=(5,))
    x = torch.cat([harvest(model, [find_hook(model, "residual.0")], i, skip_ids=(5,))["residual.0"] for i in items])
    codes = dictionary.encode(x)
    error = (dictionary.decode(codes).detach() - x).double().square().sum(1).mean()
    variance = (x.double() - x.double().mean(0)).square().sum(1).mean()
    assert figures["fvu"] == pytest.approx(float(error / variance), rel=1e-4)
    assert figures["explained_variance"] == pytest.approx(1 - figures["fvu"])
    assert figures["l0"] == pytest.approx(float((codes.values != 0).sum(1).float().mean()))
    assert figures["dead"] == pytest.approx(1 - len(codes.indices[codes.values != 0].unique()) / 16)
    often = (codes.to_dense() != 0).double().mean(0) > 0.1
    assert figures["dense"] == pytest.approx(float(often.double().mean()))
    assert figures["num_tokens"] == len(x)
    with torch.no_grad():
        logits = torch.cat([model(ids).logits[0, :-1] for ids in items])
    wanted = torch.nn.functional.cross_entropy(logits, torch.cat([ids[0, 1:] for ids in items]))
    assert figures["ce_loss"]["model"] == pytest.approx(float(wanted), rel=1e-4)
    assert judge(model, "residual.0", Perfect(32, 16, TopK(3)), items)["ce_loss_score"] == pytest.approx(1)


def test_a_step_is_in_force_and_leaves_nothing(model, items, tmp_path):
    loaded = Loaded(model, None, "tiny")
    with torch.no_grad():
        before = model(items[0]).logits
    options = options_for("topk_sae")(hooks=("residual.0",), live=True, **OPTIONS)
    applied = apply_step(loaded, "topk_sae", options, items)
    dictionary = applied.fitted[0].dictionary
    with torch.no_grad():
        model(items[0])
        inner = harvest(model, [find_hook(model, "model.layers.1.input")], items[0])["model.layers.1.input"]
        wanted = harvest(model, [find_hook(model, "mlp.0")], items[0])
    assert wanted["mlp.0"].shape == inner.shape
    assert 0 < applied.density()["residual.0"] <= 4 / 48
    rank = torch.linalg.matrix_rank(inner - dictionary.offset)
    assert rank <= 20
    assert "FVU" in applied.state()["notes"][1]
    applied.write(tmp_path)
    again = load_dictionary(tmp_path / "dictionaries" / "residual.0")
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), dictionary.state_dict().values(), strict=True)
    )
    applied.reset()
    assert applied.density() == {"residual.0": 0}
    applied.remove()
    with torch.no_grad():
        assert torch.equal(model(items[0]).logits, before)


def test_special_tokens_pass_a_step_as_they_are(tiny_model):
    model, tokenizer = tiny_model("llama", vocab_size=300), byte_tokenizer(300)
    texts = [torch.cat([torch.tensor([[256]]), torch.randint(97, 120, (1, 12))], 1) for _ in range(4)]
    place = find_hook(model, "model.layers.1.input")
    before = harvest(model, [place], texts[0])[place.name]
    options = options_for("topk_sae")(hooks=("residual.0",), live=True, **OPTIONS)
    applied = apply_step(Loaded(model, tokenizer, "tiny"), "topk_sae", options, texts)
    after = harvest(model, [place], texts[0])[place.name]
    assert torch.equal(after[0], before[0])
    assert not torch.isclose(after[1:], before[1:]).all(1).any()
    applied.remove()


def test_windows_begin_as_the_tokenizer_says():
    windows = text_windows(byte_tokenizer(300), "abcdefghij" * 300, 257, max_tokens=2000)
    assert [item.shape for item in windows] == [(7, 257)]
    assert (windows[0][:, 0] == 256).all()
    assert windows[0][:, 1:].flatten().tolist() == list(("abcdefghij" * 300).encode()[: 7 * 256])


def test_bad_input(model, items):
    assert middle_hook(model) == "residual.0"
    assert "topk_sae" in learned()
    assert accepts("topk_sae", "k")
    assert not accepts("topk_sae", "l1")
    with pytest.raises(InputError, match=r"method must be one of .*topk_sae.*, got topk_see"):
        build("topk_see", 8, 16)
    with pytest.raises(InputError, match=r"l1 must be left out for topk_sae, which has no such option, got 1.0"):
        fitted(model, items, l1=(1.0,))
    with pytest.raises(InputError, match=r"method must need no gradients .*got gradient_sae"):
        fit_on(model, "gradient_sae", Options(**OPTIONS), items, source="tiny", texts="random")
    with pytest.raises(InputError, match=r"k must be in \[1, 48\], got 64"):
        fitted(model, items, k=(64,))
    with pytest.raises(InputError, match=r"the nearest are residual\.0"):
        fitted(model, items, hooks=("residul.0",))
    with pytest.raises(InputError, match="items must hold at least one, got none"):
        fitted(model, [])
    with pytest.raises(InputError, match="text must have at least 255 tokens, got 3"):
        text_windows(byte_tokenizer(300), "abc", 256, max_tokens=99)
    with pytest.raises(InputError, match="hook must be 16 wide like the dictionary, got 32"):
        judge(model, "residual.0", SparseAutoencoder(16, 8, TopK(2)), items)
    with pytest.raises(InputError, match="calibration must hold at least 2 texts, to train on and"):
        apply_step(Loaded(model, None, "tiny"), "topk_sae", options_for("topk_sae")(), items[:1])
    with pytest.raises(InputError, match=r"k must be one value in a recipe, got \(2, 4\)"):
        apply_step(Loaded(model, None, "tiny"), "topk_sae", options_for("topk_sae")(k=(2, 4)), items)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(InputError, match="activations must be finite"):
        fitted(model, items, hooks=("residual.0",))
    with pytest.raises(InputError, match="activations must be finite"):
        next(live_source(model, "residual.0", items).batches(4))
