import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Llama4ForCausalLM, Llama4TextConfig, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

from paucity.checks import InputError
from paucity.models.hooks import capture_inputs, input_norms, input_samples
from paucity.models.sites import find_sites, weight_view

EMBEDDINGS = ("embedding", "position_embedding")


def seen_inputs(model, sites, batches):
    """Inputs of every module by a recorder of its own: what `hooks` must see."""
    seen = {site.name: [] for site in sites}
    handles = [
        model.get_submodule(site.module).register_forward_hook(
            lambda _, args, output, name=site.name: seen[name].append(args)
        )
        for site in sites
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return seen


def naive_norms(model, site, calls):
    """By loops over tokens and experts, in float64."""
    weight = weight_view(model, site)
    if weight.ndim != 3:
        rows = [row for (inputs,) in calls for row in inputs.reshape(-1, inputs.shape[-1]).double()]
        return sum(row**2 for row in rows).sqrt()
    module = model.get_submodule(site.module)
    out = torch.zeros(weight.shape[0], weight.shape[2], dtype=torch.float64)
    for states, routing, _ in calls:
        for token in range(states.shape[0]):
            for expert in routing[token].tolist():
                x = states[token]
                if site.kind == "expert_down":
                    half = module.down_proj.shape[2]
                    gate_up = module.gate_up_proj[expert].detach()
                    x = module.act_fn(gate_up[:half] @ x) * (gate_up[half:] @ x)
                out[expert] += x.double() ** 2
    return out.sqrt()


def test_norms_match_naive(tiny_model, architecture):
    model = tiny_model(architecture)
    sites = [site for site in find_sites(model) if site.kind not in EMBEDDINGS]
    batches = [torch.randint(3, 64, (1, 9)), torch.randint(3, 64, (1, 6))]
    norms = input_norms(model, sites, batches)
    assert list(norms) == [site.name for site in sites]
    for site, calls in ((site, seen_inputs(model, [site], batches)[site.name]) for site in sites):
        wanted = naive_norms(model, site, calls)
        assert norms[site.name].dtype == torch.float32
        assert torch.allclose(norms[site.name].double(), wanted, rtol=1e-4, atol=1e-5), site.name


def test_expert_without_tokens_has_norm_zero(tiny_model):
    model = tiny_model("mixtral")
    sites = find_sites(model, ["experts"])
    routing = seen_inputs(model, sites[:1], [torch.tensor([[5]])])[sites[0].name][0][1]
    norms = input_norms(model, sites[:2], [torch.tensor([[5]])])
    used = torch.zeros(4, dtype=torch.bool).index_fill_(0, routing.flatten(), True)
    assert used.sum() == 2
    for site in sites[:2]:
        assert norms[site.name].shape == (4, weight_view(model, site).shape[-1])
        assert torch.equal(norms[site.name].any(-1), used)


TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("build", "shape", "kwargs"),
    [
        (lambda: ViTModel(ViTConfig(**TINY, image_size=8, patch_size=4)), (2, 3, 8, 8), lambda x: {"pixel_values": x}),
        (
            lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=5)),
            (2, 7),
            lambda x: {"input_ids": x, "decoder_input_ids": F.pad(x[:, :-1], (1, 0), value=5)},
        ),
    ],
)
def test_norms_of_other_transformers(build, shape, kwargs):
    """The main input is given by its name, and a decoder reads the text behind its start."""
    model = build().eval()
    batch = torch.randn(shape) if len(shape) == 4 else torch.randint(3, 64, shape)
    sites = find_sites(model, "linear")
    seen = {site.name: [] for site in sites}
    with capture_inputs(model, sites, lambda site, inputs, _: seen[site.name].append(inputs)), torch.no_grad():
        model(**kwargs(batch))
    norms = input_norms(model, sites, [batch])
    for site in sites:
        torch.testing.assert_close(norms[site.name], torch.cat(seen[site.name]).square().sum(0).sqrt())


def test_experts_that_get_their_tokens_already_scaled():
    """Llama 4 gives every expert all tokens, those of other experts as zeros, and stores its stacks transposed."""
    options = TINY | {"intermediate_size_mlp": 24, "num_local_experts": 3, "num_key_value_heads": 1, "head_dim": 8}
    model = Llama4ForCausalLM(Llama4TextConfig(**options, vocab_size=64, pad_token_id=0)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    sites = find_sites(model, "experts")
    seen = {site.name: [None] * 3 for site in sites}

    def note(site, inputs, expert):
        seen[site.name][expert] = inputs

    outputs = {}
    handles = [
        model.get_submodule(site.module).register_forward_hook(
            lambda _, args, out, name=site.name: outputs.update({name: out})
        )
        for site in sites
    ]
    with capture_inputs(model, sites, note), torch.no_grad():
        model(torch.randint(3, 64, (1, 12)))
    for handle in handles:
        handle.remove()
    for site in sites:
        assert sum(len(inputs) for inputs in seen[site.name]) == 12  # one expert a token
        assert weight_view(model, site).shape == ((3, 48, 16) if site.kind == "expert_gate_up" else (3, 16, 24))
        if site.kind == "expert_down":  # what is captured, times the weights, is what the module gives
            parts = zip(seen[site.name], weight_view(model, site), outputs[site.name].view(3, 12, 16), strict=True)
            for inputs, weight, out in parts:
                torch.testing.assert_close(inputs @ weight.T, out[out.any(-1)])


def test_norms_of_plain_modules():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(1), nn.Linear(4 * 4, 1))
    images = torch.randn(3, 2, 4, 4)
    norms = input_norms(model, find_sites(model), [images[:1], images[1:]])
    assert torch.allclose(norms["0.weight"], images.square().sum((0, 2, 3)).sqrt())
    assert torch.allclose(norms["2.weight"], model[:2](images).detach().square().sum(0).sqrt())


def test_samples_are_rows_that_were_seen(tiny_model, architecture):
    model = tiny_model(architecture)
    sites = find_sites(model, "linear")
    batches = list((torch.randperm(61)[:36] + 3).view(3, 1, 12))  # no token twice, so no two rows are equal
    whole = input_samples(model, sites, batches, max_tokens=10_000)
    some = input_samples(model, sites, batches, max_tokens=7, seed=3)
    for site in sites:
        norms = input_norms(model, [site], batches)[site.name]
        total = norms.square().sum(0) if norms.ndim == 2 else norms.square()
        assert torch.allclose(whole[site.name].square().sum(0), total, rtol=1e-4, atol=1e-5)
        assert some[site.name].shape == (7, weight_view(model, site).shape[-1])
        places = [(whole[site.name] == row).all(-1).nonzero() for row in some[site.name]]
        assert all(len(place) for place in places)
        if norms.ndim == 1:  # a token goes to several experts
            order = [place.item() for place in places]
            assert order == sorted(set(order))  # without replacement, in order
    again = input_samples(model, sites, batches, max_tokens=7, seed=3)
    assert all(torch.equal(some[name], again[name]) for name in some)


def test_samples_are_uniform_and_shared_between_sites():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    nn.init.constant_(model[0].weight, 2.0)
    nn.init.zeros_(model[0].bias)
    rows = torch.arange(40.0).reshape(8, 5, 1)
    counts = torch.zeros(40)
    for seed in range(300):
        sample = input_samples(model, find_sites(model), list(rows), max_tokens=10, seed=seed)
        counts[sample["0.weight"].flatten().long()] += 1
        assert torch.equal(sample["1.weight"], 2 * sample["0.weight"])
    assert counts.sum() == 3000
    assert ((counts - 75).abs() < 5 * (300 * 0.25 * 0.75) ** 0.5).all()  # five standard deviations


def test_hooks_are_removed_after_an_error(tiny_model):
    model = tiny_model("llama")
    site = find_sites(model, "q")[0]
    with capture_inputs(model, [site], lambda *_: None):
        assert model.get_submodule(site.module)._forward_pre_hooks
    assert not model.get_submodule(site.module)._forward_pre_hooks
    with pytest.raises(IndexError):
        input_norms(model, [site], [torch.tensor([[999]])])
    assert not model.get_submodule(site.module)._forward_pre_hooks


def test_bad_input(tiny_model):
    model = tiny_model("llama")
    sites = find_sites(model, "q")
    with pytest.raises(InputError, match=r"input_norms: batches must hold at least one batch, got none"):
        input_norms(model, sites, [])
    with pytest.raises(InputError, match=r"capture_inputs: sites must not hold embeddings.*embed_tokens"):
        input_norms(model, find_sites(model, "embedding"), [torch.tensor([[1]])])
    with pytest.raises(InputError, match=r"input_samples: max_tokens must be at least 1, got 0"):
        input_samples(model, sites, [torch.tensor([[1]])], max_tokens=0)
    with pytest.raises(InputError, match=r"hold token ids for LlamaForCausalLM, got torch.float32"):
        input_norms(model, find_sites(model, "lm_head"), [torch.ones(1, 4, 32)])
    model = nn.TransformerEncoderLayer(4, 1, dim_feedforward=4).train()
    with pytest.raises(
        InputError, match=r"sites must be run by the model's forward, got self_attn\.out_proj\.weight, wh"
    ):
        input_norms(model, find_sites(model), [torch.ones(1, 4)])
