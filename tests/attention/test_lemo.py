"""LeMo: what drops nothing is the dense model, what is dropped leaves no gradient and no activations."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from paucity.attention import LeMo, lemo
from paucity.attention.lemo_fit import Fitted
from paucity.attention.lemo_layer import record_heads
from paucity.attention.lemo_predict import Tower, block_summary, train_predictor
from paucity.catalog import METHODS
from paucity.checks import InputError
from paucity.measure.memory import peak_memory_mb
from paucity.models.applied import Applied
from paucity.models.segmented import SegmentedLoss
from paucity.ops.informative import activation_informativeness, block_informativeness, block_totals, keep_blocks

ALL = LeMo(block_size=4, attention_sparsity=0.0, mlp_sparsity=0.0, segment=8)
HALF = LeMo(block_size=4, attention_sparsity=0.5, mlp_sparsity=0.5, segment=8)
KINDS = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi", "phi3")


def ids_of(batch=2, length=30, seed=0):
    return torch.randint(4, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def undropped(model):
    """Training mode without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()


def gradients(model, ids, **inputs):
    model.zero_grad()
    loss = model(input_ids=ids, labels=inputs.pop("labels", ids), **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dropped_is_the_dense_model(tiny_model, kind):
    model, ids = undropped(tiny_model(kind)), ids_of()
    loss, wanted = gradients(model, ids)
    applied = lemo.apply(model, ALL)
    found_loss, found = gradients(model, ids)
    assert set(applied.density().values()) == {1.0}
    torch.testing.assert_close(found_loss, loss, atol=1e-5, rtol=1e-5)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["opt", "mixtral", "qwen2_moe"])
def test_attention_alone_where_the_mlp_cannot_be_told(tiny_model, kind):
    model, ids = undropped(tiny_model(kind)), ids_of()
    with pytest.raises(InputError, match="mlp must be off where layer 0 has no MLP module, got backward"):
        lemo.apply(model, HALF)
    loss, wanted = gradients(model, ids)
    applied = lemo.apply(model, ALL.model_copy(update={"mlp": "off"}))
    found_loss, found = gradients(model, ids)
    torch.testing.assert_close(found_loss, loss, atol=1e-5, rtol=1e-5)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, atol=1e-4, rtol=1e-3)
    applied.remove()
    applied = lemo.apply(model, HALF.model_copy(update={"mlp": "off"}))
    assert abs(float(gradients(model, ids)[0] - loss)) > 1e-4
    assert set(applied.density()) == {"layers.0.attention", "layers.1.attention"}


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_changes_the_loss_of_training_alone_and_is_undone(tiny_model, kind):
    model, ids = undropped(tiny_model(kind)), ids_of()
    before = copy.deepcopy(model.state_dict())
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    loss, wanted = gradients(model, ids)
    dense = model.eval()(input_ids=ids).logits.detach()
    applied = lemo.apply(model.train(), HALF)
    assert isinstance(applied, Applied)
    with pytest.raises(InputError, match="drop no tokens yet"):
        lemo.apply(model, HALF)
    found_loss, _ = gradients(model, ids)
    assert abs(float(found_loss - loss)) > 1e-4
    assert torch.equal(model.eval()(input_ids=ids).logits, dense)  # eval mode is dense
    assert all(0.3 < share < 0.7 for share in applied.density().values())
    assert len(applied.density()) == 4
    applied.reset()
    assert applied.density() == {}
    applied.remove()
    again, grads = gradients(model.train(), ids)
    assert torch.equal(again, loss)
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert not any("forward" in vars(m) or hasattr(m, lemo.ATTRIBUTE) for m in model.modules())


def naive_layer(layer, hidden, cos_sin, mlp):
    """One Llama layer on one text of blocks of 4, by loops over its tokens; half of the blocks stay."""
    length = hidden.shape[1]
    there = torch.ones(1, -(-length // 4), dtype=torch.bool)
    normed = layer.input_layernorm(hidden)
    query, key, scale = record_heads(layer.self_attn, (normed,), {"position_embeddings": cos_sin})
    score = block_totals(block_informativeness(query, key, 4, scale=scale), there)
    kept = [t for t in range(length) if keep_blocks(score, there, sparsity=0.5)[0, t // 4]]
    value = layer.self_attn.v_proj(normed).view(1, length, -1, query.shape[-1])
    rows = [torch.zeros(hidden.shape[-1])] * length
    for i in kept:
        seen, heads = [j for j in kept if j <= i], []
        for h in range(query.shape[1]):
            g = h * key.shape[1] // query.shape[1]
            weight = torch.stack([query[0, h, i] @ key[0, g, j] * scale for j in seen]).softmax(0)
            heads.append(sum(w * value[0, j, g] for w, j in zip(weight, seen, strict=True)))
        rows[i] = layer.self_attn.o_proj(torch.cat(heads))
    hidden = hidden + torch.stack(rows)
    normed = layer.post_attention_layernorm(hidden)
    inner = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
    blocks = keep_blocks(activation_informativeness(inner, 4), there, sparsity=0.5)
    stays = [mlp == "backward" or bool(blocks[0, t // 4]) for t in range(length)]
    return hidden + layer.mlp.down_proj(inner) * torch.tensor(stays)[None, :, None]


@pytest.mark.parametrize("mlp", ["backward", "both", "off"])
def test_layers_match_loops(tiny_model, mlp):
    model, ids = tiny_model("llama").train(), ids_of(1, 14)
    applied = lemo.apply(model, HALF.model_copy(update={"mlp": mlp}))
    found = model(input_ids=ids, output_hidden_states=True).hidden_states
    applied.remove()
    hidden = model.model.embed_tokens(ids)
    cos_sin = model.model.rotary_emb(hidden, position_ids=torch.arange(14)[None])
    for layer, after in zip(model.model.layers, (found[1], None), strict=True):
        hidden = naive_layer(layer, hidden, cos_sin, "backward" if mlp == "off" else mlp)
        if after is not None:
            torch.testing.assert_close(after, hidden, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[2], model.model.norm(hidden), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mlp", ["backward", "both"])
def test_dropped_tokens_get_no_gradient_through_attention_and_mlp(tiny_model, mlp):
    model = tiny_model("llama").train()
    applied = lemo.apply(model, HALF.model_copy(update={"mlp": mlp, "layers": [0]}))
    kept, layer, hidden = {}, model.model.layers[0], torch.randn(2, 14, 32, requires_grad=True)
    hook = applied.layers[0]._choose
    applied.layers[0]._choose = lambda site, score, valid: kept.setdefault(site, hook(site, score, valid))
    mask = torch.ones(14, 14).tril().bool()[None, None].expand(2, 1, 14, 14)
    places = model.model.rotary_emb(hidden, position_ids=torch.arange(14)[None])
    out, _ = layer.self_attn(hidden, position_embeddings=places, attention_mask=mask)
    (grad,) = torch.autograd.grad(out.square().sum(), hidden)
    chosen = torch.zeros(2, 14, dtype=torch.bool).scatter_(1, kept["attention"].index, kept["attention"].present)
    assert 0 < chosen.sum() < 28
    assert not grad[~chosen].any()
    assert grad[chosen].abs().sum(-1).min() > 0
    assert not out[~chosen].any()
    out = layer.mlp(hidden)
    (grad,) = torch.autograd.grad(out.square().sum(), hidden)
    chosen = torch.zeros(2, 14, dtype=torch.bool).scatter_(1, kept["mlp"].index, kept["mlp"].present)
    assert not grad[~chosen].any()
    assert grad[chosen].abs().sum(-1).min() > 0
    assert out[~chosen].any() == (mlp == "backward")


def test_attention_among_what_stays_is_causal(tiny_model):
    """The choice sees the whole text, as in the paper; with the choice held fast, no later token is seen."""
    model, ids = tiny_model("llama").train(), ids_of(1, 16)
    applied = lemo.apply(model, HALF.model_copy(update={"attention_sparsity": None, "mlp": "both"}))
    for site in applied.layers.values():
        hook = site._choose
        fixed = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
        site._choose = lambda name, score, valid, hook=hook, fixed=fixed: hook(name, fixed, valid)
    other = ids.clone()
    other[:, 9:] = 5
    one, two = (model(input_ids=x).logits for x in (ids, other))
    torch.testing.assert_close(one[:, :9], two[:, :9])
    assert not torch.allclose(one[:, 9:], two[:, 9:])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tiny_model, implementation, side):
    model = tiny_model("llama").train()
    model.set_attn_implementation(implementation)
    ids, short = ids_of(1, 16), ids_of(1, 8, seed=1)
    rows = torch.full((2, 16), 3)
    rows[0] = ids
    place = slice(8, 16) if side == "left" else slice(0, 8)
    rows[1, place] = short
    mask = torch.zeros(2, 16, dtype=torch.long)
    mask[0], mask[1, place] = 1, 1
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    lemo.apply(model, HALF.model_copy(update={"mlp": "both"}))
    both = model(input_ids=rows, attention_mask=mask, position_ids=position).logits
    torch.testing.assert_close(both[:1], model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[1:, place], model(input_ids=short).logits, atol=1e-5, rtol=1e-4)
    labels = torch.where(mask.bool(), rows, -100)
    loss, grads = gradients(model, rows, attention_mask=mask, position_ids=position, labels=labels)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads.values())


def test_checkpointing_accumulation_and_frozen_weights(tiny_model):
    model, ids = tiny_model("llama").train(), ids_of()
    lemo.apply(model, HALF)
    loss, wanted = gradients(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": False})
    again, found = gradients(model, ids)
    torch.testing.assert_close(again, loss)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-4)
    model.activation_checkpointing_disable()
    total = (ids[:, 1:] >= 0).sum()
    model.zero_grad()
    parts = [model(input_ids=row, labels=row, num_items_in_batch=total).loss for row in ids.split(1)]
    sum(parts).backward()
    torch.testing.assert_close(sum(parts).detach(), loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-3)
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("q_proj" in name)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-6, rtol=1e-4)


def small_llama(layers=2):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": layers, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=512, **sizes, num_key_value_heads=2)).train()


def test_less_memory():
    model, ids = small_llama(), torch.randint(512, (1, 1024))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    peaks = {"dense": peak_memory_mb(step)}
    loss = SegmentedLoss(model, 128)
    peaks["segments"] = peak_memory_mb(step)
    loss.remove()
    sparse = {"attention_sparsity": 0.383, "mlp_sparsity": 0.511}
    for name, options in (("whole", {"segment": None, "recompute_norms": False}), ("lemo", {"segment": 128})):
        applied = lemo.apply(model, LeMo(block_size=32, **sparse, **options))
        peaks[name] = peak_memory_mb(step)
        applied.remove()
    assert peaks["segments"] < 0.9 * peaks["dense"]
    assert peaks["whole"] < 0.95 * peaks["dense"]
    assert peaks["lemo"] < 0.75 * peaks["segments"]


def test_segmented_loss_is_the_models_own(tiny_model):
    for kind in ("llama", "gemma2"):
        model, ids = tiny_model(kind), ids_of()
        labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
        loss, wanted = gradients(model, ids, labels=labels)
        with pytest.raises(InputError, match="segment must be at least 1"):
            SegmentedLoss(model, 0)
        segmented = SegmentedLoss(model, 7)
        found_loss, found = gradients(model, ids, labels=labels)
        torch.testing.assert_close(found_loss, loss)
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-4)
        out = model(input_ids=ids, labels=labels, return_dict=False)
        torch.testing.assert_close(out[0].detach(), loss)
        segmented.remove()
        assert model(input_ids=ids, labels=labels).logits.shape[1] == 30
    with pytest.raises(InputError, match="be a causal language model that takes labels"):
        SegmentedLoss(model.base_model, 4)


def planted(generator, count=16):
    """Blocks whose first feature says how much they are looked at."""
    summary = torch.rand(1, count, 8, generator=generator)
    return summary, (4 * summary[0, :, :1] * summary[0, :, :1].T).tril()[None]


def test_predictors_learn_a_planted_pattern():
    generator = torch.Generator().manual_seed(0)
    texts = [planted(generator) for _ in range(8)]
    options = LeMo(rank=16, steps=300, learning_rate=3e-3, prune_every=100)
    predictor, loss = train_predictor("attention", texts, options, generator)
    assert loss < 0.02
    summary, wanted = planted(generator)
    found = (predictor(summary) * predictor.get_buffer("scale")).tril()
    assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.97
    predictor, loss = train_predictor("mlp", [(x, 2 * x[..., 1]) for x, _ in texts], options, generator)
    assert loss < 0.05


def test_pruning_drops_the_neurons_that_are_always_zero():
    tower = Tower(3, 8, 2).train()
    with torch.no_grad():
        tower.matrices[0].bias[2:5] = -100.0
    x = torch.rand(4, 6, 3)
    wanted = tower(x)
    tower.prune(0.999)
    assert tower.matrices[0].weight.shape[0] <= 5
    assert tower.matrices[1].weight.shape[1] <= 5
    torch.testing.assert_close(tower(x), wanted)


def test_a_summary_leaves_padding_out():
    hidden, valid = torch.randn(1, 10, 3), torch.arange(10)[None] >= 5
    found = block_summary(hidden, 4, valid)
    assert found.shape == (1, 3, 6)
    assert not found[:, 0].any()
    torch.testing.assert_close(found[0, 1], torch.cat([hidden[0, 5:8].mean(0), hidden[0, 5:8].amax(0)]))
    whole = block_summary(hidden, 4, torch.ones(1, 10, dtype=torch.bool))
    torch.testing.assert_close(whole[0, 2], torch.cat([hidden[0, 8:].mean(0), hidden[0, 8:].amax(0)]))


@pytest.mark.parametrize("mlp", ["backward", "both"])
def test_a_fit_is_applied_saved_and_loaded(tiny_model, tmp_path, mlp):
    model, batches = tiny_model("llama"), [ids_of(1, 40), ids_of(2, 30, seed=2)]
    before = copy.deepcopy(model.state_dict())
    options = LeMo(block_size=4, attention_sparsity=0.4, mlp_sparsity=0.5, mlp=mlp, rank=8, steps=20, refinements=1)
    fitted = options.fit(model, batches)
    assert set(fitted.thresholds) == {(site, layer) for site in ("attention", "mlp") for layer in (0, 1)}
    assert set(fitted.predictors) == {key for key in fitted.thresholds if key[0] == "attention" or mlp == "both"}
    assert all(0 <= share <= 1 for share in fitted.recall.values())
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    fitted.save(tmp_path)
    loaded = Fitted.load(tmp_path)
    assert (loaded.options, loaded.thresholds, loaded.recall) == (options, fitted.thresholds, fitted.recall)
    ids, losses = ids_of(1, 40), []
    for one in (fitted, loaded):
        applied = lemo.apply(model.train(), one)
        losses.append(gradients(model, ids)[0])
        density = applied.density()
        assert applied.state()["thresholds"] == {f"layers.{i}.{s}": t for (s, i), t in fitted.thresholds.items()}
        applied.remove()
    assert torch.equal(*losses)
    attention = [density[f"layers.{layer}.attention"] for layer in (0, 1)]
    assert 0.3 < sum(attention) / 2 < 0.95
    with pytest.raises(InputError, match="hold lemo"):
        Fitted.load(tmp_path / "nowhere")


def test_the_accuracy_moves_thresholds(tiny_model, monkeypatch):
    """A layer whose threshold costs accuracy drops less, and the others more."""
    model = tiny_model("llama")
    monkeypatch.setattr(
        "paucity.attention.lemo_fit.next_token_loss",
        lambda model, ids, labels: getattr(model.model.layers[0].self_attn, lemo.ATTRIBUTE).owner.thresholds[
            "attention", 0
        ],
    )
    options = LeMo(block_size=4, attention_sparsity=0.5, rank=8, steps=5, mlp="off", eta=0.5, refinements=0)
    batches = [ids_of(1, 80)]
    even = options.fit(model, batches)
    moved = options.model_copy(update={"refinements": 2}).fit(model, batches)
    assert moved.thresholds["attention", 0] < even.thresholds["attention", 0]
    assert moved.thresholds["attention", 1] > even.thresholds["attention", 1]


def test_it_is_no_step_of_a_recipe():
    from paucity.attention.portable import methods

    assert METHODS["lemo"].load() is LeMo
    assert not METHODS["lemo"].step
    assert "lemo" not in methods()


def test_bad_input(tiny_model):
    with pytest.raises(ValidationError, match="extra"):
        LeMo(blocks=3)
    with pytest.raises(ValidationError, match="mlp must not be off"):
        LeMo(attention=False, mlp="off")
    model = tiny_model("llama").train()
    with pytest.raises(InputError, match="layers must be among the 2 attention layers, got 7"):
        lemo.apply(model, LeMo(layers=[7]))
    with pytest.raises(InputError, match="batches must hold a text of over 64 tokens, got 30 at most"):
        LeMo().fit(model, [ids_of()])
    with pytest.raises(InputError, match="be a decoder-only Hugging Face model"):
        lemo.apply(nn.Linear(2, 2), LeMo())
    applied = lemo.apply(model, HALF)
    cache = model.eval()(input_ids=ids_of(), use_cache=True).past_key_values
    with pytest.raises(InputError, match="cache must be empty while tokens are dropped"):
        model.train()(input_ids=ids_of(), past_key_values=cache)
    with pytest.raises(InputError, match=r"attention mask must be none, \[B, T\] or \[B, H, T, T\] for 30 tokens"):
        model.model.layers[0].self_attn(torch.randn(1, 30, 32), attention_mask=torch.ones(1, 1, 30, 7).bool())
    applied.remove()


def test_a_refused_apply_leaves_the_model_as_it_was(tiny_model):
    model = tiny_model("llama").model
    with pytest.raises(InputError, match="be a causal language model that takes labels"):
        lemo.apply(model, HALF)
    assert not model._forward_pre_hooks
