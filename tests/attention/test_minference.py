"""The search of minference, against dense masks of every candidate and head."""

import copy

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import MInference, PerHead, SinkWindow, apply, from_json, minference, record, to_json
from paucity.attention.site import ATTRIBUTE
from paucity.checks import InputError
from paucity.ops.formats.block import BlockMask

from .test_apply import logits, model_of, tokens

OPTIONS = {
    "a_shape": [[2, 6]],
    "vertical_slash": [[1, 4], [6, 1]],
    "block_topk": [3],
    "block_size": 4,
    "q_block": 4,
    "min_length": 8,
}


@pytest.fixture(autouse=True)
def few_scales(monkeypatch):
    monkeypatch.setattr(minference, "FACTORS", (0.05, 0.1, 0.2, 0.3, 0.5, 1.0))


def watched(model, ids):
    """Query, key, value and prompt of every layer."""
    return {seen.prompt.layer: seen[:4] for seen in record(model, ids)}


def naive(policy, query, key, value, prompt, criterion):
    """Share of the pairs and criterion of each head, ``[H]`` each, by dense masks."""
    length, heads = query.shape[2], query.shape[1]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    score = query @ key.mT * prompt.scale
    score = score if prompt.softcap is None else prompt.softcap * torch.tanh(score / prompt.softcap)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    seen = (j <= i) & (j > i - (prompt.window or length))
    pattern = policy.select(query, key, prompt)
    blocks = isinstance(pattern, BlockMask)
    mask = (pattern.to_dense(causal=True) if blocks else pattern.visible(length, length)) & seen
    prob = score.masked_fill(~seen, -torch.inf).softmax(-1)
    sparse = score.masked_fill(~mask, -torch.inf).softmax(-1) @ value
    error = (sparse - prob @ value).norm(dim=(2, 3)) / (prob @ value).norm(dim=(2, 3))
    recall = (prob * mask).sum(-1).mean(-1)
    share = mask.sum((-1, -2)).expand(len(query), heads) / seen.sum()
    return share.mean(0), (error if criterion == "output_error" else recall).mean(0)


@pytest.mark.parametrize(
    ("kind", "criterion", "equal_pairs"),
    [("llama", "output_error", True), ("gemma2", "recall", True), ("gemma2", "output_error", False)],
)
def test_every_head_has_the_best_candidate_within_the_density(kind, criterion, equal_pairs):
    model, prompts = model_of(kind), [tokens(40, 2), tokens(29, seed=1)]
    options = MInference(**OPTIONS, density=0.4, criterion=criterion, equal_pairs=equal_pairs)
    found = options.search(model, prompts)
    assert [(choice.layer, choice.head) for choice in found] == [(layer, head) for layer in (0, 1) for head in range(4)]
    seen = [watched(model, ids) for ids in prompts]
    sign = 1 if criterion == "recall" else -1
    for layer in (0, 1):
        figures = [
            [
                sum(torch.stack(naive(policy, *prompt[layer], criterion)) for prompt in seen) / 2  # [2, H]
                for policy in scales
            ]
            for scales in options.candidates()
        ]
        for choice in found[4 * layer : 4 * layer + 4]:
            best = []
            for scales, by_scale in zip(options.candidates(), figures, strict=True):
                each = [x[:, choice.head].tolist() for x in by_scale]
                scale = max((n for n, (share, _) in enumerate(each) if share <= 0.4), default=0)
                best.append((sign * each[scale][1], scales[scale], each[scale][0]))
            for (value, share), one in zip(choice.candidates, best, strict=True):
                assert (sign * value, share) == pytest.approx((one[0], one[2]), rel=1e-4, abs=1e-5)
            score, policy, share = max((x for x in best if x[2] <= 0.4 or not equal_pairs), key=lambda x: x[0])
            assert choice.policy == policy
            assert (choice.score, choice.density) == pytest.approx((sign * score, share), rel=1e-4)


def test_the_policy_gives_each_head_its_choice_and_costs_what_was_said():
    model, ids = model_of("llama"), tokens(60)
    options = MInference(**OPTIONS, density=0.3)
    found = options.search(model, [ids])
    policy = options.fit(model, [ids])
    assert isinstance(policy, PerHead)
    assert policy.min_length == 8
    assert from_json(to_json(policy)) == policy
    for choice in found:
        assert policy.choices[policy.assignment[choice.layer][choice.head]] == choice.policy
        assert choice.density <= 0.3
    assert len(policy.choices) == len({repr(choice.policy) for choice in found})
    applied = apply(model, policy)
    logits(model, ids)
    said = torch.tensor([choice.density for choice in found]).view(2, 4)
    torch.testing.assert_close(applied.head_density()[0], said[0], atol=1e-6, rtol=1e-5)  # the first reads dense input


def test_a_text_too_short_for_the_density_gets_the_cheapest():
    options = MInference(**{**OPTIONS, "a_shape": []}, density=0.01)
    for choice in options.search(model_of("llama"), [tokens(9)]):
        assert choice.density == min(density for _, density in choice.candidates)


def test_the_model_is_left_as_it_was_also_on_error():
    model, ids = model_of("llama"), tokens(40)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before, config = copy.deepcopy(model.state_dict()), model.config._attn_implementation
    dense = logits(model, ids)
    with pytest.raises(IndexError):
        MInference(**OPTIONS).fit(model, [ids, ids + 1000])
    MInference(**OPTIONS).fit(model, [ids])
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == config
    assert not any(hasattr(module, ATTRIBUTE) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, ids), dense)


def test_sizes_in_tokens_are_those_given():
    policies = [policy for (policy,) in MInference(equal_pairs=False).candidates()]
    assert policies[0] == SinkWindow(num_sinks=100, window_size=800)
    assert [(p.num_vertical, p.num_slash) for p in policies[1:5]] == [(30, 800), (100, 750), (500, 700), (3500, 100)]
    assert (policies[5].num_blocks, policies[5].q_block, policies[5].k_block) == (100, 64, 64)


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.0},
        {"criterion": "mass"},
        {"a_shape": [[1]]},
        {"vertical_slash": [[0, 4]]},
        {"block_topk": [0]},
        {"a_shape": [], "vertical_slash": [], "block_topk": []},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValidationError):
        MInference(**options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "calibration must hold at least one prompt, got none"),
        ([tokens(9), tokens(1)], r"calibration must have a row of at least 2 tokens, got shape \[1, 1\]"),
        ([tokens(9)[:0]], r"calibration must have a row of at least 2 tokens, got shape \[0, 9\]"),
        ([tokens(9)[0]], r"calibration must have 2 dimensions, got shape \[9\]"),
        ([[1, 2, 3]], "calibration must be a tensor, got list"),
    ],
)
def test_prompts_are_needed(prompts, message):
    with pytest.raises(InputError, match=f"minference: {message}"):
        MInference().fit(model_of("llama"), prompts)
