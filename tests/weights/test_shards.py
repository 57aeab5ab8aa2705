"""Pruning from files to files."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import paucity
from paucity.checks import InputError
from paucity.weights import Magnitude, SparseGPT, Taylor, Wanda, prune
from paucity.weights.to_folder import prune_folder


def tokens(count=3, length=20):
    return [torch.randint(0, 64, (1, length)) for _ in range(count)]


@pytest.fixture
def folder(tiny_model, tmp_path):
    def build(architecture, **options):
        model = tiny_model(architecture)
        path = tmp_path / architecture
        model.save_pretrained(path, **options)
        return model, path

    return build


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "gpt_neox", "opt", "phi3"])
@pytest.mark.parametrize(
    "pruner",
    [Wanda(sparsity=0.6), SparseGPT(n=2, m=4), Magnitude(allocation="erk"), Wanda(allocation="owl"), Taylor()],
)
def test_the_same_as_in_memory(folder, tmp_path, kind, pruner):
    model, source = folder(kind)
    batches = tokens()
    record = prune_folder(source, tmp_path / "out", pruner, calibration=batches)
    masks = prune(model, pruner, calibration=batches)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=1e-4, atol=1e-4)
    assert record["sparsity"] == pytest.approx(masks.achieved_in(model).achieved, abs=2e-3)
    assert record["calibration_tokens"] == (0 if isinstance(pruner, Magnitude) else 60)
    assert "sparsity_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "paucity.json").read_text()) == record


def test_a_killed_job_goes_on_behind_what_it_wrote(folder, tmp_path):
    _, source = folder("llama", max_shard_size="20KB")
    batches, seen = tokens(), []

    def kill(done, total, what):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, tmp_path / "out", Wanda(), calibration=batches, on_progress=kill)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="resume must continue a run of the same plan"):
        prune_folder(source, tmp_path / "out", Wanda(sparsity=0.4), calibration=batches, resume=True)
    with pytest.raises(InputError, match="hold no unfinished run"):
        prune_folder(source, tmp_path / "out", Wanda(), calibration=batches)
    prune_folder(
        source, tmp_path / "out", Wanda(), calibration=batches, resume=True, on_progress=lambda d, t, w: seen.append(d)
    )
    assert min(seen) == 7  # the first block's seven sites are not solved again
    prune_folder(source, tmp_path / "whole", Wanda(), calibration=batches)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(InputError, match="out must not exist"):
        prune_folder(source, tmp_path / "out", Wanda(), calibration=batches)


def test_only_one_block_is_in_memory(folder, tmp_path):
    _, source = folder("llama")
    held = []

    def watch(done, total, what):
        import gc

        blocks = [module for module in gc.get_objects() if type(module).__name__ == "LlamaDecoderLayer"]
        held.append(sum(block.mlp.up_proj.weight.device.type != "meta" for block in blocks))

    prune_folder(source, tmp_path / "out", Wanda(), calibration=tokens(), on_progress=watch)
    assert max(held[:-1]) - min(held) <= 1


def test_tied_heads_and_the_source_stay(folder, tmp_path):
    """The embedded model ties its head; what lay in the source is not written to."""
    prune_folder("embedded", tmp_path / "out", Magnitude(sparsity=0.3))
    dense, sparse = paucity.load("embedded"), paucity.load(tmp_path / "out")
    assert torch.equal(sparse.model.lm_head.weight, dense.model.model.embed_tokens.weight)
    assert sparse.tokenizer is not None
    assert (sparse.model.model.layers[0].mlp.up_proj.weight == 0).float().mean() == pytest.approx(0.3, abs=1e-3)


def test_bad_input_writes_nothing(folder, tmp_path):
    _, source = folder("llama")
    cases = [
        (source, Wanda(), (), "at least one batch of tokens"),
        (source, Wanda(), [torch.tensor([[99]])], "token ids from 0 to 63"),
        (source, Magnitude(block=(1, 7)), (), "block must divide"),
        (source, Magnitude(sites=("conv",)), (), "kinds must be in the model"),
        (tmp_path / "nothing", Magnitude(), (), "be 'embedded', a hub id or a folder"),
    ]
    for path, pruner, calibration, message in cases:
        with pytest.raises(InputError, match=message):
            prune_folder(path, tmp_path / "out", pruner, calibration=calibration)
    assert not list(tmp_path.glob("out*"))
    (source / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="readable safetensors"):
        prune_folder(source, tmp_path / "out", Magnitude())


def base_only(model, path):
    """As GPT-2 lies on the hub: without the prefix of the base model, and with a buffer."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    tensors = {name: tensor.clone() for name, tensor in state.items() if name != "lm_head.weight"}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 256, 256)}, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "sites", "reason"),
    [
        ("mixtral", ("linear",), "tensors in its files are not parameters one to one"),
        ("gpt2", ("linear",), "tensors in its files are not parameters one to one"),
        ("llama", ("lm_head",), "lm_head.weight is in no block"),
    ],
)
def test_what_cannot_be_read_by_blocks_is_loaded_whole(folder, tmp_path, kind, sites, reason):
    model, source = folder(kind)
    if kind == "gpt2":
        base_only(model, source)
    record = prune_folder(source, tmp_path / "out", Magnitude(sites=sites))
    assert "the model was loaded whole" in record["notes"][0]
    assert reason in record["notes"][0]
    prune(model, Magnitude(sites=sites))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(again.get_parameter(name), parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("pruner", [SparseGPT(), SparseGPT(order="block")])
def test_the_record_of_a_killed_job_is_that_of_a_whole_one(folder, tmp_path, pruner):
    _, source = folder("llama")
    batches = tokens(1, 8)  # fewer tokens than inputs: singular Hessians, which are noted

    def kill(done, total, what):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, tmp_path / "out", pruner, calibration=batches, on_progress=kill)
    again = prune_folder(source, tmp_path / "out", pruner, calibration=batches, resume=True)
    whole = prune_folder(source, tmp_path / "whole", pruner, calibration=batches)
    assert whole["notes"]
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    assert list(again["layers"]) == list(whole["layers"])
    assert not (tmp_path / "out" / "stages").exists()


def test_the_record_says_what_calibration_was(folder, tmp_path):
    _, source = folder("llama")
    about = {"text": "mine.txt", "seed": 3}
    for pruner, wanted in ((Wanda(), about), (Magnitude(), None)):
        out = tmp_path / type(pruner).__name__
        record = prune_folder(source, out, pruner, calibration=tokens(), about=about)
        assert json.loads((out / "paucity.json").read_text())["calibration"] == record["calibration"] == wanted
