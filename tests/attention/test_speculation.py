"""Self-speculation: greedy and sampled decoding give what the dense model gives, whatever the draft is worth."""

import copy
from contextlib import nullcontext

import pytest
import torch

from paucity.attention import SinkWindow, apply, remove
from paucity.attention.decode import DecodePolicy, OracleTopK, Pages
from paucity.attention.eviction import Knorm
from paucity.attention.speculation import speculate
from paucity.attention.speculation.verify import accept_greedy, accept_sampled
from paucity.checks import InputError


class Streaming(DecodePolicy):
    """The first key and the last ones; ``window_size`` beyond the text is everything."""

    window_size: int = 2

    def select(self, query, cached, prompt):
        place = torch.arange(cached.longest).expand(*cached.lengths.shape, -1)
        kept = (place < cached.lengths[..., None]) & (
            (place == 0) | (place >= cached.lengths[..., None] - self.window_size)
        )
        return Pages(torch.where(kept, place, -1), 1)


def sparse(**options):
    return Streaming(min_length=0, **options)


def greedy(model, ids, new, **options):
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 2, "do_sample": False} | options
    return model.generate(ids, max_new_tokens=new, **options)


@pytest.mark.parametrize("architecture_", ["llama", "qwen3", "gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize(("prompt", "new", "num_draft"), [(1, 12, 3), (20, 3, 8), (20, 1, 2), (9, 24, 4)])
def test_greedy_is_the_dense_model(tiny_model, architecture_, prompt, new, num_draft):
    model = tiny_model(architecture_)
    ids = torch.randint(3, 64, (1, prompt))
    draft = sparse(window_size=2)
    found = speculate(model, ids, draft=draft, num_draft=num_draft, max_new_tokens=new)
    assert torch.equal(found.tokens, greedy(model, ids, new))
    assert int(found.advanced.sum()) == found.tokens.shape[1] - prompt - 1


def test_a_draft_that_sees_everything_is_always_accepted(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (2, 12))
    whole = speculate(model, ids, draft=sparse(window_size=200), num_draft=4, max_new_tokens=21, eos_token_id=[])
    assert whole.accepted.tolist() == [[4, 4]] * 4
    assert (whole.acceptance, whole.tokens_per_step) == (1.0, 5.0)
    blind = speculate(model, ids, draft=sparse(window_size=1), num_draft=4, max_new_tokens=21, eos_token_id=[])
    assert torch.equal(blind.tokens, whole.tokens)
    assert blind.acceptance < 1


def test_rows_with_padding_and_ends_are_the_rows_alone(tiny_model):
    model = tiny_model("llama")
    ids = torch.randint(3, 64, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :11] = 0, 0
    free = greedy(model, ids, 16, attention_mask=mask, eos_token_id=None)
    end = int(free[0, 17])
    draft = sparse(window_size=3)
    options = {"draft": draft, "max_new_tokens": 16, "attention_mask": mask}
    assert torch.equal(speculate(model, ids, eos_token_id=[], **options).tokens, free)
    wanted = greedy(model, ids, 16, attention_mask=mask, eos_token_id=[end, 1])
    found = speculate(model, ids, eos_token_id=[end, 1], pad_token_id=2, **options)
    assert torch.equal(found.tokens[:, : wanted.shape[1]], wanted)
    assert bool((found.tokens[:, wanted.shape[1] :] == 2).all())
    assert not bool(found.accepted[-1][found.tokens[:, -1] == 2].any())


@pytest.mark.parametrize("pad", [None, 7])
def test_the_result_ends_where_the_last_row_does(tiny_model, pad):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (2, 12))
    free = greedy(model, ids, 16, eos_token_id=None)[:, 12:]
    ends = [int(free[0].max()), int(free[1].min())]
    ends = sorted(ends, reverse=True)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ends, pad
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    found = speculate(model, ids, draft=sparse(window_size=200), num_draft=7, max_new_tokens=16)
    assert torch.equal(found.tokens, wanted)
    assert int(found.advanced.sum()) == wanted.shape[1] - 13


def test_acceptance_counts_rows_that_go_on_alone(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (2, 12))
    free = greedy(model, ids, 21, eos_token_id=None)[:, 12:]
    end = next(int(token) for token in free[0] if token not in free[1])
    found = speculate(model, ids, draft=sparse(window_size=200), max_new_tokens=21, eos_token_id=end)
    assert found.ended.any()
    assert not found.accepted[found.ended].any()
    assert found.acceptance == 1.0


def test_greedy_acceptance_is_the_longest_common_beginning():
    drafted = torch.tensor([[3, 1, 2], [0, 1, 2], [3, 1, 0]])
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 1, 0, 2]] * 3), 4).float()
    count, following = accept_greedy(drafted, logits)
    assert (count.tolist(), following.tolist()) == ([2, 0, 3], [0, 3, 2])


@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_acceptance_keeps_the_distribution(seed):
    """Over all draws the first kept or replaced token follows the model, as does the second after it."""
    generator = torch.Generator().manual_seed(seed)
    draft, prob = torch.rand(2, 5, generator=generator).softmax(-1), torch.randn(3, 5, generator=generator).softmax(-1)
    draft[0, 0], draft[0, 1] = 0.0, draft[0, 0] + draft[0, 1]  # never drafted, but possible
    rows = 200_000
    drafted = torch.stack([torch.multinomial(row, rows, replacement=True, generator=generator) for row in draft], dim=1)
    count, following = accept_sampled(
        drafted, draft.expand(rows, -1, -1), prob.expand(rows, -1, -1), generator=generator
    )
    known = torch.cat([drafted, torch.zeros(rows, 1, dtype=torch.long)], dim=1)
    known = known.scatter(1, count.unsqueeze(1), following.unsqueeze(1))
    first = known[:, 0].bincount(minlength=5) / rows
    torch.testing.assert_close(first, prob[0], atol=4e-3, rtol=0)
    second = known[count >= 1, 1].bincount(minlength=5) / int((count >= 1).sum())
    torch.testing.assert_close(second, prob[1], atol=6e-3, rtol=0)
    kept = torch.minimum(draft[0], prob[0]).sum()
    assert (count >= 1).float().mean().item() == pytest.approx(kept.item(), abs=4e-3)


def test_sampling_follows_the_dense_model_and_its_seed(tiny_model):
    model = tiny_model("llama", vocab_size=12)
    ids = torch.randint(3, 12, (1, 6))
    options = {"draft": sparse(window_size=2), "num_draft": 2, "eos_token_id": [], "do_sample": True}
    once = speculate(model, ids, max_new_tokens=9, seed=3, **options).tokens
    assert torch.equal(once, speculate(model, ids, max_new_tokens=9, seed=3, **options).tokens)
    assert not torch.equal(once, speculate(model, ids, max_new_tokens=9, seed=4, **options).tokens)
    draws = speculate(
        model, ids.expand(4000, -1), max_new_tokens=2, seed=0, temperature=0.5, top_k=6, **options
    ).tokens[:, 6:]
    logits = model(ids).logits[0, -1].float() / 0.5
    prob = logits.masked_fill(logits < logits.topk(6).values[-1], -torch.inf).softmax(-1)
    torch.testing.assert_close(draws[:, 0].bincount(minlength=12) / 4000, prob, atol=0.03, rtol=0)
    first = int(prob.argmax())
    logits = model(torch.cat([ids, torch.tensor([[first]])], dim=1)).logits[0, -1].float() / 0.5
    prob = logits.masked_fill(logits < logits.topk(6).values[-1], -torch.inf).softmax(-1)
    mine = draws[draws[:, 0] == first, 1]
    torch.testing.assert_close(mine.bincount(minlength=12) / len(mine), prob, atol=0.06, rtol=0)


def test_transformers_own_assisted_decoding_takes_a_sparse_copy_as_its_assistant(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (1, 40))
    assistant = copy.deepcopy(model)
    apply(assistant, sparse(window_size=4))
    try:
        found = greedy(model, ids, 20, assistant_model=assistant)
    finally:
        remove(assistant)
    assert torch.equal(found, greedy(model, ids, 20))


@pytest.mark.parametrize("kind", ["applied", "context", "oracle"])
def test_the_draft_may_be_a_policy_one_in_force_or_any_context(tiny_model, kind):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (1, 30))
    wanted = greedy(model, ids, 20)
    applied = apply(model, sparse(window_size=4)) if kind == "applied" else None
    draft = {"applied": applied, "context": nullcontext, "oracle": OracleTopK(num_keys=6, min_length=0)}[kind]
    found = speculate(model, ids, draft=draft, max_new_tokens=20)
    assert torch.equal(found.tokens, wanted)
    assert (found.draft_density is None) == (kind == "context")
    if applied is not None:
        assert found.draft_density < 0.2
        assert not applied.paused
        assert found.tokens.shape == speculate(model, ids, draft=applied, max_new_tokens=20).tokens.shape
        applied.remove()
    assert model.config._attn_implementation == "sdpa"


def test_a_prefill_policy_rules_the_prompt_alone(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (1, 40))
    applied = apply(model, SinkWindow(min_length=0, num_sinks=0, window_size=4))
    wanted = greedy(model, ids, 20)
    assert torch.equal(speculate(model, ids, draft=sparse(), max_new_tokens=20).tokens, wanted)
    applied.remove()
    assert not torch.equal(wanted, greedy(model, ids, 20))


def test_bad_input(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (2, 6))
    with pytest.raises(InputError, match="draft must be a decode policy or a context, got int"):
        speculate(model, ids, draft=3, max_new_tokens=4)
    applied = apply(model, OracleTopK())
    with pytest.raises(InputError, match="model must carry no other decode policy"):
        speculate(model, ids, draft=sparse(), max_new_tokens=4)
    applied.remove()
    with pytest.raises(InputError, match="draft must be in force on the model"):
        speculate(model, ids, draft=applied, max_new_tokens=4)
    evicting = apply(model, Knorm())
    with pytest.raises(InputError, match="model must carry no eviction policy"):
        speculate(model, ids, draft=sparse(), max_new_tokens=4)
    evicting.remove()
    draft = sparse(window_size=2)
    with pytest.raises(InputError, match="num_draft must be at least 1"):
        speculate(model, ids, draft=draft, num_draft=0, max_new_tokens=4)
    with pytest.raises(InputError, match="temperature must be in"):
        speculate(model, ids, draft=draft, max_new_tokens=4, temperature=0.0)
    with pytest.raises(InputError, match="context of 256 tokens"):
        speculate(model, ids, draft=draft, max_new_tokens=251)
    for wrong in ([[1, 1, 1, 1, 1, 0]] * 2, [[1, 0, 1, 1, 1, 1]] * 2):
        with pytest.raises(InputError, match="attention_mask must have padding on the left alone"):
            speculate(model, ids, draft=draft, max_new_tokens=4, attention_mask=torch.tensor(wrong))
    with pytest.raises(InputError, match="input_ids must hold tokens"):
        speculate(model, ids[:, :0], draft=draft, max_new_tokens=4)
