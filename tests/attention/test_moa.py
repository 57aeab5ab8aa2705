"""Influence of attention on the loss of a model, and the spans that follow from it."""

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from paucity.attention import Influence, MoA, PrefillPolicy, Spans, apply, from_json, influence, to_json
from paucity.attention.compute import Attended
from paucity.attention.influence import next_token_loss
from paucity.attention.spans import pair_share
from paucity.checks import InputError
from paucity.ops.formats.stripes import Window

SIZE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
SMALL = {"num_sinks": 4, "block_size": 4, "min_length": 0, "q_block": 8, "num_alpha": 4, "num_beta": 5, "gap": 0.02}


def model_of(config=LlamaConfig, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZE, **options), dtype=torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(20.0 if "q_proj" in name or "embed" in name else 6.0)
    return model


def tokens(length, batch=1, seed=0):
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


class Without(PrefillPolicy):
    """Dense attention in which one query of one head does not see one key; notes the mass that it had."""

    layer: int
    head: int
    row: int
    column: int
    min_length: int = 0

    def select(self, query, key, prompt):
        return Window(key.shape[2])

    def compute(self, query, key, value, prompt):
        length = query.shape[2]
        seen = torch.ones(query.shape[1], length, length, dtype=torch.bool).tril()
        if prompt.layer == self.layer:
            seen[self.head, self.row, self.column] = False
        logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * prompt.scale
        prob = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        out = prob @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)
        return Attended(out, torch.ones(1, 1, dtype=torch.int64), None)


def test_influence_is_what_dropping_an_entry_does_to_the_loss():
    model, ids = model_of(), tokens(10)
    found = influence(model, ids, block_size=1)
    assert found.blocks.shape == (2, 4, 10, 10)
    assert (found.length, found.layers, found.windows) == (10, (0, 1), (None, None))
    with torch.no_grad():
        dense = next_token_loss(model, ids, None)
    pairs = []
    for layer in range(2):
        for head in range(4):
            for row, column in [(3, 1), (6, 6), (8, 2), (8, 7), (7, 0)]:
                applied = apply(model, Without(layer=layer, head=head, row=row, column=column))
                with torch.no_grad():
                    change = next_token_loss(model, ids, None) - dense
                applied.remove()
                pairs.append((float(change), float(found.blocks[layer, head, row, column])))
    true, predicted = torch.tensor(pairs).T
    error = (predicted - true).abs() / (true.abs() + 1e-5)
    assert true.abs().max() > 1e-2
    assert error.median() < 0.03
    assert (error < 0.2).float().mean() > 0.85  # the others had most of the mass of their row
    assert torch.corrcoef(torch.stack([true, predicted]))[0, 1] > 0.97


def test_only_what_leads_to_a_label_has_influence():
    model, ids = model_of(), tokens(16, batch=2)
    labels = torch.full_like(ids, -100)
    labels[:, 9] = ids[:, 9]
    blocks = influence(model, ids, labels, block_size=1, absolute=True).blocks
    assert (blocks[:, :, 9:] == 0).all()
    assert (blocks[1, :, :8] == 0).all()  # in the last layer the query before the label alone
    assert (blocks[1, :, 8].sum(-1) > 0).all()
    rows = [influence(model, ids[r : r + 1], labels[r : r + 1], block_size=1, absolute=True).blocks for r in range(2)]
    torch.testing.assert_close(blocks, (rows[0] + rows[1]) / 2)


def test_the_model_is_left_as_it_was(monkeypatch):
    model, ids = model_of(attention_dropout=0.5), tokens(12)
    frozen = model_of().requires_grad_(False)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    found = influence(model, ids, block_size=4)
    torch.testing.assert_close(influence(frozen, ids, block_size=4).blocks, found.blocks)

    def check():
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert model.config._attn_implementation == "eager"
        assert not any(hasattr(module, "prefill_policy") for module in model.modules())

    check()
    monkeypatch.setattr(model.lm_head, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        influence(model, ids)
    check()


def planted(length, far_head, windows=(None, None)):
    """Every head looks near, one of them far too."""
    count = length // 4
    blocks = torch.eye(count).expand(2, 4, count, count).clone() + 0.01 * torch.ones(count, count).tril()
    blocks[1, far_head] = torch.ones(count, count).tril()
    return Influence(blocks, length, (0, 1), windows)


@pytest.mark.parametrize("density", [0.35, 0.5])
def test_plans_keep_the_density_at_every_length_and_see_far_where_it_counts(density):
    search = MoA(**{**SMALL, "gap": 1e-5}, density=density)
    plans = search.plans([planted(48, 2), planted(96, 2)], [144])
    assert plans
    for plan in plans:
        for length in (48, 96, 144):
            spans = [plan.span(layer, length, 4) for layer in range(2)]
            shares = [pair_share(span, 4, length) for row in spans for span in row]
            assert sum(shares) / 8 <= density + 1e-6
            assert length != 96 or spans[1][2] > 4
        assert all(len(set(zip(a, b, strict=True))) <= 2 for a, b in zip(plan.alpha, plan.beta, strict=True))
    far = max(plans, key=lambda plan: plan.span(1, 96, 4)[2])
    assert far.span(1, 96, 4)[2] == max(far.span(0, 96, 4) + far.span(1, 96, 4)) >= 48
    free = MoA(**SMALL, density=density, rules_per_layer=None).plans([planted(48, 2)])
    assert free[0].span(1, 48, 4)[2] == max(free[0].span(0, 48, 4) + free[0].span(1, 48, 4)) >= 16


def test_a_sliding_window_counts_as_dense_in_its_layer():
    plan = MoA(**SMALL, density=0.7).plans([planted(64, 0, windows=(None, 8))])[0]
    shares = [pair_share(span, 4, 64, w) for layer, w in ((0, None), (1, 8)) for span in plan.span(layer, 64, 4)]
    assert sum(shares) / 8 <= 0.7 + 1e-6
    assert all(share == 1 for share in shares[4:])


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig])
def test_fit_gives_a_policy_of_that_density(config):
    model = model_of(config, **({"sliding_window": 40} if config is MistralConfig else {}))
    search = MoA(**SMALL, density=0.5, lengths=[48, 96], validation_length=128, num_samples=2, num_intervals=1)
    calibration = [tokens(60, 2, seed) for seed in range(4)]
    plan = search.fit(model, calibration)
    assert isinstance(plan, Spans)
    assert from_json(to_json(plan)) == plan == search.fit(model, calibration)
    applied = apply(model, plan)
    for length in (48, 96, 128):
        applied.reset()
        with torch.no_grad():
            model(input_ids=tokens(length, seed=9))
        assert 0.2 < sum(applied.density().values()) / 2 <= 0.5 + 1e-6


def test_the_plan_with_the_least_loss_is_taken():
    model = model_of()
    search = MoA(**SMALL, density=0.5, num_intervals=1)
    profiled = [(tokens(length, seed=seed), None) for seed in range(2) for length in (48, 96)]
    validation = [(tokens(128, seed=7), None)]
    means = search.profile(model, profiled)
    alone = [influence(model, ids, block_size=4, absolute=True).blocks for ids, _ in profiled if ids.shape[1] == 96]
    torch.testing.assert_close(means[1].blocks, (alone[0] + alone[1]) / 2)
    losses = []
    plans = search.plans(means, [128])
    for plan in plans:
        applied = apply(model, plan)
        with torch.no_grad():
            losses.append(float(next_token_loss(model, *validation[0])))
        applied.remove()
    assert search.search(model, profiled, validation) == plans[losses.index(min(losses))]


def test_bad_input():
    model, few = model_of(), [tokens(40)]
    with pytest.raises(InputError, match="lengths must be given where there is room for 20 tokens"):
        MoA().fit(model, few)
    with pytest.raises(InputError, match=r"calibration must have at least 64 tokens for lengths \[32\] and 32, got 40"):
        MoA(lengths=[32], validation_length=32).fit(model, few)
    with pytest.raises(InputError, match="lengths must be at most the model's context of 256 tokens, got 300"):
        MoA(lengths=[300]).fit(model, [tokens(1000)])
    with pytest.raises(InputError, match="validation must hold at least one text"):
        MoA().search(model, [(tokens(32), None)], [])
    with pytest.raises(InputError, match="budget must be met by some choice"):
        MoA(**SMALL, density=0.01).plans([planted(64, 0)])
    with pytest.raises(InputError, match="labels must have a token that counts"):
        influence(model, tokens(8), torch.full((1, 8), -100))
    with pytest.raises(InputError, match=r"labels must have shape \[1, 8\]"):
        influence(model, tokens(8), tokens(7))
    with pytest.raises(InputError, match="input_ids must have a row of at least 2 tokens"):
        influence(model, tokens(1))
    for options in (
        {"density": 0.0},
        {"density": 1.1},
        {"num_sinks": 3, "block_size": 4},
        {"lengths": [1]},
        {"gap": -1.0},
    ):
        with pytest.raises((ValidationError, InputError)):
            MoA(**options)
