"""Activations by the names of places: against recorders of our own, on every architecture."""

import pytest
import torch
from torch import nn

from paucity.checks import InputError, InputTypeError
from paucity.models.access import per_head
from paucity.models.harvest import harvest, kept_tokens
from paucity.models.places import Hook, find_hook
from paucity.models.substitute import substituted
from paucity.models.vision import ConvNet, ViT


def recorded(model, path, inputs, end="output", **options):
    """What a module gives or takes, by a hook of the test's own around a whole forward."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _, args, output: seen.append(output if end == "output" else args[0])
    )
    with torch.no_grad():
        model(inputs, **options)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def test_places_of_every_architecture(tiny_model, architecture):
    model, ids = tiny_model(architecture), torch.randint(3, 64, (2, 7))
    names = ["residual.0", "residual.1", "mlp.1", "attention.0", "heads.1", "heads.1.3"]
    hooks = [find_hook(model, name) for name in names]
    found = harvest(model, hooks, ids)
    assert list(found) == names
    for hook in hooks[:5]:
        wanted = recorded(model, hook.module, ids, hook.end)
        assert torch.equal(found[hook.name], wanted.reshape(14, -1)), hook.name
    assert found["residual.0"].shape == (14, 32)
    heads = per_head(found["heads.1"], 4)
    assert torch.equal(found["heads.1.3"], heads[:, 3])
    # the block adds what its parts give; the residual after it is therefore no part of them alone
    assert not torch.equal(found["residual.1"], found["mlp.1"])


def test_heads_side_by_side_are_the_attention_by_hand(tiny_model):
    """Grouped queries: one slice for each query head, softmax(q k / sqrt d) v with the key of its group."""
    model, ids = tiny_model("llama"), torch.randint(3, 64, (1, 5))
    layer = model.model.layers[0].self_attn
    x = harvest(model, [find_hook(model, "model.layers.0.input_layernorm")], ids)["model.layers.0.input_layernorm"]
    found = harvest(model, [find_hook(model, "heads.0")], ids)["heads.0"].view(5, 4, 8)
    with torch.no_grad():
        v = layer.v_proj(x).view(5, 2, 8)
    for head in range(4):  # the first token sees itself alone
        torch.testing.assert_close(found[0, head], v[0, head // 2])


def test_one_forward_for_all_and_no_further_than_needed(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (1, 5))
    calls = {0: 0, 1: 0}
    for layer in calls:
        model.model.layers[layer].register_forward_hook(
            lambda *_, layer=layer: calls.__setitem__(layer, calls[layer] + 1)
        )
    harvest(model, [find_hook(model, name) for name in ("mlp.0", "heads.0", "attention.0")], ids)
    assert calls == {0: 0, 1: 0}  # seen within block 0, where the forward ended
    harvest(model, [find_hook(model, name) for name in ("residual.0", "residual.1")], ids)
    assert calls[0] == 1
    assert not model.model.layers[0].mlp._forward_hooks


def test_padding_and_special_tokens_are_left_out(tiny_model):
    model = tiny_model("llama")
    ids = torch.tensor([[1, 5, 6, 7], [9, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    hook = find_hook(model, "residual.1")
    found = harvest(model, [hook], {"input_ids": ids, "attention_mask": mask}, skip_ids=(1,))["residual.1"]
    alone = [harvest(model, [hook], row)["residual.1"] for row in (ids[:1], ids[1:, :2])]
    torch.testing.assert_close(found, torch.cat([alone[0][1:], alone[1]]))
    assert kept_tokens(ids, (1, 7)).tolist() == [[False, True, True, False], [True] * 4]
    assert kept_tokens(torch.randn(2, 3, 4, 4)) is None


def test_left_padding_is_the_text_alone(tiny_model):
    model, ids = tiny_model("llama"), torch.tensor([[0, 0, 9, 8, 7]])
    hook = find_hook(model, "residual.1")
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "position_ids": torch.tensor([[0, 0, 0, 1, 2]])}
    torch.testing.assert_close(
        harvest(model, [hook], inputs)["residual.1"], harvest(model, [hook], ids[:, 2:])["residual.1"]
    )


def test_pictures_give_patches_or_places():
    model, pictures = ViT(dim=16, depth=2, heads=2).eval(), torch.randn(3, 1, 28, 28)
    found = harvest(model, [find_hook(model, name) for name in ("patches.1", "residual.1", "heads.0.1")], pictures)
    wanted = recorded(model, "blocks.1", pictures)
    assert torch.equal(found["patches.1"], wanted.reshape(-1, 16))
    assert torch.equal(found["residual.1"], found["patches.1"])
    assert found["heads.0.1"].shape == (3 * 49, 8)
    net = ConvNet(width=4).eval()
    places = harvest(net, [find_hook(net, "blocks.0")], pictures)["blocks.0"]
    wanted = recorded(net, "blocks.0", pictures)
    assert torch.equal(places[:2], torch.stack([wanted[0, :, 0, 0], wanted[0, :, 0, 1]]))


def test_class_tokens_are_no_patches():
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    model, pictures = transformers.ViTModel(config).eval(), torch.randn(2, 3, 8, 8)
    name = next(path for path, _ in model.named_modules() if path.endswith(".1") and "layer" in path)
    hooks = [find_hook(model, place) for place in ("patches.1", "residual.1")]
    found = harvest(model, hooks, {"pixel_values": pictures})
    wanted = recorded(model, name, pictures)
    assert wanted.shape == (2, 5, 16)
    assert torch.equal(found["patches.1"], wanted[:, 1:].reshape(-1, 16))
    assert torch.equal(found["residual.1"], wanted.reshape(-1, 16))


class Pair(nn.Module):
    def forward(self, x):
        return (None, 2 * x, x)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.pair, self.unused = nn.Linear(4, 4), Pair(), nn.Linear(4, 4)
        self.input = nn.Linear(4, 4)

    def forward(self, x):
        _, doubled, _ = self.pair(self.first(x))
        return self.input(doubled)


def test_any_module_tuples_and_modes():
    model, x = Plain().train(), torch.randn(3, 4)
    found = harvest(model, [find_hook(model, n) for n in ("pair", "pair.input", "first.input", "input")], x)
    torch.testing.assert_close(found["pair"], 2 * found["pair.input"])
    assert torch.equal(found["first.input"], x)
    assert torch.equal(found["input"], model(x).detach())
    assert model.training
    assert not found["pair"].requires_grad


def test_substituting_changes_what_comes_after():
    model, x = Plain().eval(), torch.randn(3, 4)
    with torch.no_grad(), substituted(model, find_hook(model, "pair"), torch.zeros_like):
        torch.testing.assert_close(model(x), model.input.bias.expand(3, 4))
    with torch.no_grad(), substituted(model, find_hook(model, "input.input"), lambda rows: rows + 1):
        changed = model(x)
    torch.testing.assert_close(changed, model(x) + model.input.weight.sum(1))
    narrow = substituted(model, find_hook(model, "pair"), lambda rows: rows[:, :2])
    with pytest.raises(InputError, match=r"change must give shape \[3, 4\], got \[3, 2\]"), narrow:
        model(x)
    assert torch.equal(model(x), model(x))
    assert not model.pair._forward_hooks


def test_one_head_is_substituted_alone(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (1, 5))
    whole, one = find_hook(model, "heads.1"), find_hook(model, "heads.1.2")
    before = harvest(model, [whole], ids)["heads.1"].view(5, 4, 8)
    with substituted(model, one, torch.zeros_like):
        after = harvest(model, [whole], ids)["heads.1"].view(5, 4, 8)
    assert (after[:, 2] == 0).all()
    assert torch.equal(after[:, [0, 1, 3]], before[:, [0, 1, 3]])


def test_bad_input(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (1, 5))
    with pytest.raises(
        InputError, match=r"hook must be the name of a place .*got residul.1; the nearest are residual.1"
    ):
        find_hook(model, "residul.1")
    with pytest.raises(InputError, match=r"got residual.2; the nearest are residual\.[01]"):
        find_hook(model, "residual.2")
    with pytest.raises(InputError, match=r"hook must name a head from 0 to 3, got heads.1.4"):
        find_hook(model, "heads.1.4")
    with pytest.raises(InputTypeError, match="hook must be a string"):
        find_hook(model, 3)
    with pytest.raises(InputError, match="hooks must be places of this model, got elsewhere"):
        harvest(model, [Hook("elsewhere", "no.such")], ids)
    plain = Plain()
    with pytest.raises(InputError, match="hooks must be run by the model's forward, got unused, not run"):
        harvest(plain, [find_hook(plain, "unused"), find_hook(plain, "first")], torch.randn(2, 4))
    with pytest.raises(InputError, match="model must cut pictures into patches"):
        harvest(model, [find_hook(model, "patches.0")], ids)
    with pytest.raises(InputError, match="heads must divide the width"):
        per_head(torch.ones(2, 6), 4)
    pooled = nn.Sequential(nn.Embedding(64, 4), nn.Flatten(), nn.Linear(20, 4))
    with pytest.raises(InputError, match="hooks must give one activation for each token, got 1 for 5 at 2"):
        harvest(pooled, [find_hook(pooled, "2")], ids)


def test_what_a_later_place_overwrites_is_as_it_was():
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), torch.randn(5, 4)
    first, last = find_hook(net, "0"), find_hook(net, "2")
    assert torch.equal(harvest(net, [first], x)["0"], harvest(net, [first, last], x)["0"])


def test_inputs_by_keyword_and_named_outputs_are_substituted(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (2, 5))
    with torch.no_grad():
        before = model(ids).logits
        for name in ("model.layers.1.self_attn.input", "model.layers.1.mlp.input", "model"):
            hook, seen = find_hook(model, name), []
            with substituted(model, hook, lambda x, seen=seen: (seen.append(x), torch.zeros_like(x))[1]):
                assert not torch.equal(model(ids).logits, before), name
            assert torch.equal(seen[0].flatten(0, 1), harvest(model, [hook], ids)[name])


def test_a_decoder_is_masked_by_its_own_tokens():
    import transformers

    config = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=50, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BartModel(config).eval()
    ids, other = torch.randint(3, 50, (2, 7)), torch.randint(3, 50, (2, 4))
    masks = {"attention_mask": torch.ones_like(ids), "decoder_attention_mask": torch.ones_like(other)}
    masks["attention_mask"][0, 4:] = masks["decoder_attention_mask"][1, 2:] = 0
    inputs = {"input_ids": ids, "decoder_input_ids": other} | masks
    hooks = [find_hook(model, name) for name in ("encoder.residual.0", "decoder.residual.0", "decoder.heads.0.3")]
    assert [each.shape for each in harvest(model, hooks, inputs).values()] == [(11, 16), (6, 16), (6, 4)]
    assert hooks[2].module == "decoder.layers.0.self_attn.out_proj"  # not the attention to the encoder
    with pytest.raises(InputError, match="inputs must hold decoder_input_ids"):
        harvest(model, [hooks[1]], ids)
    with pytest.raises(InputError, match=r"one of the model's towers \(encoder.residual.0, decoder.residual.0\)"):
        find_hook(model, "residual.0")


class Turned(nn.Module):
    """Convolutions inside, channels last outside."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.act(self.conv(x)).permute(0, 2, 3, 1))


def test_channels_are_the_width_wherever_they_are():
    model, x = nn.Sequential(Turned()), torch.randn(2, 3, 6, 5)
    found = harvest(model, [find_hook(model, name) for name in ("0.conv", "0.act", "0")], x)
    assert all(rows.shape == (60, 8) for rows in found.values())
    assert torch.equal(found["0.act"], found["0.conv"].relu())
    assert torch.equal(found["0"], model(x).detach().reshape(60, 8))
    square = harvest(model, [find_hook(model, "0.act")], torch.randn(1, 3, 8, 8))["0.act"]
    assert square.shape == (64, 8)
    line = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU())
    assert harvest(line, [find_hook(line, "1")], torch.randn(2, 3, 11))["1"].shape == (18, 8)
    seen = []
    with torch.no_grad(), substituted(model, find_hook(model, "0.act"), lambda rows: (seen.append(rows), 2 * rows)[1]):
        changed = model(x)
    assert torch.equal(seen[0].reshape(60, 8), found["0.act"])
    torch.testing.assert_close(changed - model[0].out.bias, 2 * (model(x) - model[0].out.bias))


def test_other_inputs(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (2, 5))
    hook = find_hook(model, "residual.0")
    inputs = {"input_ids": ids, "attention_mask": None, "use_cache": False}
    assert torch.equal(harvest(model, [hook], inputs)["residual.0"], harvest(model, [hook], ids)["residual.0"])
    with pytest.raises(InputError, match=r"attention_mask must have shape \[2, 5\]"):
        harvest(model, [hook], inputs | {"attention_mask": torch.ones(2, 1, 5, 5)})
    with pytest.raises(InputError, match=r"inputs must be ids \[B, T\] or floats, got torch.uint8"):
        harvest(model, [hook], torch.zeros(2, 3, 8, 8, dtype=torch.uint8))

    class SequenceFirst(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).transpose(0, 1))

    turned = SequenceFirst(nn.Embedding(64, 4), nn.Linear(4, 4))
    with pytest.raises(InputError, match=r"hooks must give activations \[B, T, width\], got \[5, 2, 4\] at 1"):
        harvest(turned, [find_hook(turned, "1")], ids)


def test_patches_are_substituted_without_class_tokens():
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    model, pictures = transformers.ViTModel(config).eval(), torch.randn(2, 3, 8, 8)
    whole, patches = find_hook(model, "residual.0"), find_hook(model, "patches.0")
    before = harvest(model, [whole], pictures)["residual.0"].view(2, 5, 16)
    with substituted(model, patches, torch.zeros_like):
        after = harvest(model, [whole], pictures)["residual.0"].view(2, 5, 16)
    assert torch.equal(after[:, 0], before[:, 0])
    assert (after[:, 1:] == 0).all()
