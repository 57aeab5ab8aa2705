"""The order of pruning: block by block, on kept hidden states or from the start, resumed, and on any calibration."""

from contextlib import nullcontext

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paucity.checks import InputError
from paucity.models.blocks import Chain, UpTo, open_chain, sites_by_block
from paucity.models.hooks import capture_inputs, input_norms
from paucity.models.sites import find_sites
from paucity.weights import Random, SparseGPT, Taylor, Wanda, prune
from paucity.weights.layerwise import prune_layers
from paucity.weights.matrices import as_matrices, from_matrices
from paucity.weights.wanda import wanda_mask


def tokens(count=3, length=12):
    return [torch.randint(0, 64, (1, length)) for _ in range(count)]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_every_architecture_goes_block_by_block(tiny_model, architecture):
    """On hidden states that are kept, every site sees just what it sees in the whole model."""
    model, batches = tiny_model(architecture), [*tokens(2), *tokens(1, 7)]
    blocks = sites_by_block(find_sites(model, ("linear",)))
    chain = open_chain(model, [path for path, _ in blocks], batches)
    assert isinstance(chain, Chain)

    def seen(walk, path, group):
        found = []
        with capture_inputs(model, group, lambda site, x, expert: found.append((site.name, expert, x.clone()))):
            if walk is None:
                for batch in batches:
                    UpTo(model, path)(batch)
            else:
                for _ in walk.peek(path):
                    pass
        return found

    for path, group in blocks:
        for one, other in zip(seen(chain, path, group), seen(None, path, group), strict=True):
            assert one[:2] == other[:2]
            torch.testing.assert_close(one[2], other[2], rtol=1e-4, atol=1e-5)
        chain.advance(path)


def test_a_model_whose_blocks_share_more_starts_anew(tiny_model):
    model = tiny_model("llama")
    paths = [path for path, _ in sites_by_block(find_sites(model, ("linear",)))]
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    assert open_chain(model, paths, tokens()) is None  # what comes out is not what the next block takes
    handle.remove()
    assert open_chain(model, [*paths[:1], "model.norm"], tokens()) is None
    assert open_chain(nn.Linear(2, 2), ["0"], [torch.ones(1, 2)]) is None
    assert "forward" not in vars(model.model.layers[0])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot", "taylor", "random", "magnitude"])
def test_a_killed_job_goes_on_where_it_was(tiny_model, method, tmp_path):
    model, batches = tiny_model("llama"), tokens()
    dense = state(model)
    expected = prune(model, method, sparsity=0.5, calibration=batches)
    wanted = state(model)
    model.load_state_dict(dense)

    def kill(done, total, what):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, method, sparsity=0.5, calibration=batches, keep=tmp_path, on_progress=kill)
    assert same(state(model), dense)
    (first,) = tmp_path.glob("*.safetensors")
    assert first.name == "model.layers.0.self_attn.q_proj.weight.safetensors"
    solved = []
    masks = prune(
        model,
        method,
        sparsity=0.5,
        calibration=batches,
        keep=tmp_path,
        on_progress=lambda d, t, w: solved.append((d, t)),
    )
    assert masks == expected
    assert same(state(model), wanted)
    assert (1, 14) in solved
    assert solved[-1] == (14, 14)


def test_a_folder_of_another_job_is_refused(tiny_model, tmp_path):
    model, batches = tiny_model("llama"), tokens()
    dense = state(model)
    expected = prune(model, "wanda", sparsity=0.5, calibration=batches, keep=tmp_path)
    model.load_state_dict(dense)
    other = tiny_model("llama")
    cases = [
        (model, "wanda", 0.6, batches),
        (model, "sparsegpt", 0.5, batches),
        (model, "wanda", 0.5, tokens()),
        (other, "wanda", 0.5, batches),
        (tiny_model("gpt2"), "wanda", 0.5, batches),
    ]
    for given, method, sparsity, calibration in cases:
        with pytest.raises(InputError, match="keep must be a new folder or that of the same job"):
            prune(given, method, sparsity=sparsity, calibration=calibration, keep=tmp_path)
    assert same(state(model), dense)
    assert prune(model, "wanda", sparsity=0.5, calibration=batches, keep=tmp_path) == expected
    (tmp_path / "job.json").unlink()
    with pytest.raises(InputError, match="that of the same job"):
        prune(other, "wanda", sparsity=0.5, calibration=batches, keep=tmp_path)


def test_notes_survive_a_kill(tiny_model, tmp_path):
    model, batches = tiny_model("llama").bfloat16(), tokens(1, 8)  # fewer tokens than inputs: singular Hessians
    sites, dense = find_sites(model, ("linear",)), state(model)

    def run(keep, tell=lambda *_: None):
        model.load_state_dict(dense)
        return prune_layers(model, sites, SparseGPT(), batches, tell=tell, keep=keep).notes

    def kill(done, total, what):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, kill)
    wanted = run(None)
    assert wanted
    assert run(tmp_path) == wanted


def test_seeds_of_random_masks():
    net = nn.Sequential(nn.Linear(6, 8))
    prune(net, Random(seed=2**32 - 1))
    with pytest.raises(ValidationError, match="less than 4294967296"):
        Random(seed=2**32)


def test_calibration_in_any_form(tiny_model):
    model = tiny_model("llama")
    dense, ids = state(model), torch.randint(3, 64, (4, 10))
    expected = prune(model, "wanda", calibration=[row[None] for row in ids])
    model.load_state_dict(dense)
    padded = torch.cat([torch.zeros(4, 3, dtype=torch.int64), ids], 1)
    mask = torch.cat([torch.zeros(4, 3, dtype=torch.int64), torch.ones_like(ids)], 1)
    loader = DataLoader(
        [{"input_ids": i, "attention_mask": a} for i, a in zip(padded, mask, strict=True)], batch_size=2
    )
    assert prune(model, "wanda", calibration=loader) == expected
    model.load_state_dict(dense)
    assert prune(model, "wanda", calibration=DataLoader(TensorDataset(ids), batch_size=2)) == expected


def test_gradients_of_a_classifier_and_of_text(tiny_model):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(5, 6), torch.randint(0, 3, (5,))
    nn.functional.cross_entropy(net(x), y).backward()
    importance = (net[0].weight * net[0].weight.grad).square()
    weight = net[0].weight.detach().clone()
    masks = prune(net, "taylor", sparsity=0.5, calibration=[(x, y)])
    assert importance[masks["0.weight"]].min() >= importance[~masks["0.weight"]].max()
    assert torch.equal(net[0].weight, weight * masks["0.weight"])
    with pytest.raises(InputError, match=r"calibration must hold \(inputs, labels\)"):
        prune(net, "taylor", calibration=[x])
    frozen = tiny_model("gpt2").requires_grad_(False)
    assert prune(frozen, Taylor(sparsity=0.3), calibration=tokens()).sparsity().achieved == pytest.approx(0.3, abs=0.01)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize(("channels", "groups"), [((4, 6), 1), ((4, 6), 2), ((4, 4), 4)])
def test_convolutions_are_matrices_of_patches(channels, groups):
    """The output of a convolution is its patches times its matrices, for every stride, padding and dilation."""
    for cls, dims in ((nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)):
        for mode, padding in (("zeros", 1), ("zeros", "same"), ("circular", 2), ("zeros", "valid")):
            stride = 1 if padding == "same" else 2
            conv = cls(
                *channels, 3, stride=stride, padding=padding, dilation=2, groups=groups, padding_mode=mode, bias=False
            )
            model, x = nn.Sequential(conv), torch.randn(2, channels[0], *[9] * dims)
            (site,) = find_sites(model, "conv")
            patches = []
            with capture_inputs(
                model, [site], lambda s, rows, group, to=patches: to.append((group, rows)), patches=True
            ):
                out = model(x)
            matrices = as_matrices(model, site)
            parts = [rows @ matrices[group].T for group, rows in patches]
            product = torch.cat(parts, 1).view(2, -1, channels[1]).mT
            torch.testing.assert_close(product, out.flatten(2), rtol=1e-4, atol=1e-5)
            assert torch.equal(from_matrices(model, site, matrices), conv.weight)


def test_sparsegpt_on_convolutions_and_experts(tiny_model):
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 5))
    x = torch.randn(40, 1, 5, 5) + 0.2 * torch.randn(40, 4, 5, 5)
    dense, weights = net(x), state(net)
    errors = {}
    for method in ("magnitude", "sparsegpt"):
        net.load_state_dict(weights)
        masks = prune(net, method, sparsity=0.6, sites=("conv", "linear"), calibration=[x[:20], x[20:]])
        assert masks.sparsity().achieved == pytest.approx(0.6, abs=0.01)
        errors[method] = (net(x) - dense).square().mean()
    assert errors["sparsegpt"] < 0.7 * errors["magnitude"]
    mixture = tiny_model("mixtral")
    masks = prune(mixture, "sparsegpt", n=2, m=4, calibration=tokens(6, 40))
    name = "model.layers.1.mlp.experts.down_proj"
    assert (masks[name].view(4, 32, -1, 4).sum(-1) == 2).all()
    assert (mixture.get_parameter(name)[~masks[name]] == 0).all()


def test_a_model_already_sparse_keeps_its_zeros_and_says_so(tiny_model):
    model, batches = tiny_model("llama"), tokens(4, 40)
    first = prune(model, "magnitude", sparsity=0.6)
    result = prune_layers(model, find_sites(model, ("linear",)), SparseGPT(sparsity=0.3), batches, tell=lambda *_: None)
    assert all((model.get_parameter(name)[~first[name]] == 0).all() for name in first)
    assert any("60% of it was zero before" in note for note in result.notes)


@pytest.mark.parametrize("allocation", ["erk", "owl", "cfsp", "greedy"])
def test_allocations_of_sparsegpt(tiny_model, allocation):
    masks = prune(tiny_model("llama"), "sparsegpt", sparsity=0.5, allocation=allocation, calibration=tokens(4, 40))
    report = masks.sparsity()
    assert report.achieved == pytest.approx(0.5, abs=0.02)
    assert max(report.layers.values()) - min(report.layers.values()) > (0.005 if allocation == "cfsp" else 0.02)


def test_bad_calibration_is_refused_before_any_work(tiny_model):
    model = tiny_model("llama")
    dense = state(model)
    cases = [
        ([torch.tensor([[1, 64]])], "token ids from 0 to 63, got 64"),
        ([torch.tensor([[-1, 3]])], "token ids from 0 to 63, got -1"),
        ([torch.ones(1, 0, dtype=torch.int64)], "hold no empty batch"),
        ([torch.ones(1, 300, dtype=torch.int64)], "context of 256 tokens, got 300"),
        ([torch.ones(4, dtype=torch.int64)], r"input_ids \[batch, tokens\]"),
        (["a text"], "calibration must hold tensors"),
        ([], "at least one batch"),
    ]
    for calibration, message in cases:
        with pytest.raises(InputError, match=message):
            prune(model, "sparsegpt", calibration=calibration)
    with pytest.raises(InputError, match="be finite, got a batch with NaN"):
        prune(nn.Sequential(nn.Linear(2, 2)), "wanda", calibration=[torch.tensor([[1.0, float("nan")]])])
    with pytest.raises(InputError, match="block must divide the columns"):
        prune(model, "magnitude", block=(1, 7))
    with pytest.raises(InputError, match="method must hold the other options itself"):
        prune(model, Wanda(), sparsity=0.3, calibration=tokens())
    assert same(state(model), dense)


class Cell(nn.Module):
    """Runs one layer six times; what it reads of its own is 0 at first."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(8, 4)

    def forward(self, x):
        hidden = torch.zeros(len(x), 4)
        for t in range(x.shape[1]):
            hidden = torch.tanh(self.cell(torch.cat([x[:, t], hidden], 1)))
        return hidden


class Around(nn.Module):
    """Two layers within a context of the thread."""

    def __init__(self, context):
        super().__init__()
        self.a, self.b, self.context = nn.Linear(8, 8), nn.Linear(8, 8), context

    def forward(self, x):
        with self.context():
            return self.b(self.a(x))


def test_every_run_of_a_layer_counts():
    model, x = Cell(), torch.randn(5, 6, 4)
    norm = input_norms(model, find_sites(model), [x])["cell.weight"]
    expected = wanda_mask(model.cell.weight, norm, sparsity=0.5)
    assert torch.equal(prune(model, "wanda", sparsity=0.5, calibration=[x[:2], x[2:]])["cell.weight"], expected)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_contexts_within_a_forward_are_left(method):
    for context in (lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode):
        prune(Around(context), method, sparsity=0.5, calibration=[torch.randn(20, 8), torch.randn(20, 8)])
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_inference_mode_enabled()
    with torch.inference_mode():
        assert len(prune(Around(nullcontext), method, sparsity=0.5, calibration=[torch.randn(20, 8)])) == 2


def test_nested_stages_are_blocks_of_their_own():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    model = nn.Module()
    model.stages = nn.ModuleList(Stage() for _ in range(2))
    model.forward = lambda x: model.stages[1](model.stages[0](x))
    paths = [path for path, _ in sites_by_block(find_sites(model))]
    assert paths == [f"stages.{stage}.layers.{layer}" for stage in range(2) for layer in range(2)]
    assert len(prune(model, "wanda", calibration=[torch.randn(9, 4)])) == 4


def test_texts_of_a_plain_module_stay_apart():
    seen = []
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    model[1].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    prune(model, "wanda", calibration=[torch.arange(5), torch.arange(5)])
    assert seen.count((5, 4)) >= 2
    assert (10, 4) not in seen


@pytest.mark.parametrize(("method", "order"), [("dsnot", "dense"), ("sparsegpt", "dense"), ("wanda", "block")])
def test_what_is_solved_in_turn_is_not_global(tiny_model, method, order):
    with pytest.raises(InputError, match="scope must not be global where layers are solved one after the other"):
        prune(tiny_model("llama"), method, scope="global", order=order, calibration=tokens())
