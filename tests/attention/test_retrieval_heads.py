"""Retrieval heads: scores of a model whose heads copy or do not, masked heads, and the policy made of them."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paucity.attention import Needle, RetrievalHeads, StreamingHeads, apply, copy_prompts, masked_heads, needle_prompts
from paucity.attention.retrieval_heads import retrieval_scores
from paucity.checks import InputError
from paucity.models.load import byte_tokenizer

from .test_apply import logits, model_of, tokens


def naive_scores(model, needle):
    """The paper's sum, from the attention weights of the eager model, one whole forward pass for each token."""
    ids, config = list(needle.ids), model.config
    score = torch.zeros(config.num_hidden_layers, config.num_attention_heads)
    for _ in range(needle.num_answer):
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_attentions=True)
        token = int(out.logits[0, -1].argmax())
        for layer, weights in enumerate(out.attentions):
            for head in range(config.num_attention_heads):
                top = int(weights[0, head, -1].argmax())
                if needle.start <= top < needle.stop and ids[top] == token:
                    score[layer, head] += 1 / needle.num_answer
        ids.append(token)
    return score


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_scores_match_naive(kind):
    model, rng = model_of(kind), random.Random(0)
    needles = []
    for _ in range(6):
        ids = [rng.randrange(2, 97) for _ in range(30)]
        needles.append(Needle(tuple(ids), 0, 28, 5))  # most of the text, so that random heads score too
    wanted = torch.stack([naive_scores(model, needle) for needle in needles]).mean(0)
    found = retrieval_scores(model, needles)
    torch.testing.assert_close(found, wanted)
    assert not hasattr(model.model if kind != "gpt2" else model.transformer, "attention_policies")


def test_a_head_that_copies_scores_one():
    """Every head looks at the same token before, and its value says what comes next: a table of followers."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=16,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
    )
    model = LlamaForCausalLM(config).eval()
    layer = model.model.layers[0]
    eye = torch.eye(16)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(eye)
        follow = eye.roll(1, 0)  # token t asks for token t + 1
        layer.self_attn.q_proj.weight.copy_(40 * follow)
        layer.self_attn.k_proj.weight.copy_(40 * eye)
        layer.self_attn.v_proj.weight.copy_(eye)
        layer.self_attn.o_proj.weight.copy_(100 * eye)
        layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(eye)
    needle = Needle((1, 1, 1, 3, 4, 5, 6, 7, 8, 1, 1, 1, 3), 4, 8, 4)
    torch.testing.assert_close(retrieval_scores(model, [needle]), torch.tensor([[1.0]]))
    away = Needle(needle.ids, 0, 4, 4)
    assert float(retrieval_scores(model, [away])) == 0
    # 4, 5 and 6 lie in the needle, 7 does not.
    assert float(retrieval_scores(model, [Needle(needle.ids, 4, 7, 4)])) == pytest.approx(0.75)


def test_needles_lie_where_they_should():
    tokenizer = byte_tokenizer(300)
    text = "".join(f"x{i} = {i * i}\n" for i in range(400))
    found = needle_prompts(tokenizer, text, lengths=(400, 900), tasks=("passkey",), num_depths=4)
    assert [len(needle.ids) + needle.num_answer + 4 for needle in found] == [400] * 4 + [900] * 4
    for i, needle in enumerate(found):
        line = tokenizer.decode(needle.ids[needle.start : needle.stop])
        assert line.startswith("The pass key is ")
        assert line.endswith("is the pass key.\n")
        if i >= 4:
            assert abs(needle.start / len(needle.ids) - (i % 4 + 0.5) / 4) < 0.2
    assert found == needle_prompts(tokenizer, text, lengths=(400, 900), tasks=("passkey",), num_depths=4)


def test_copies_begin_again_at_the_end():
    stream = list(range(500))
    found = copy_prompts(stream, lengths=(60, 100), num_depths=3, num_needles=2, cue=4, answer=5)
    assert [len(needle.ids) for needle in found] == [60] * 6 + [100] * 6
    for needle in found:
        inside = needle.ids[needle.start : needle.stop]
        assert inside == tuple(range(inside[0], inside[0] + 9))
        assert needle.ids[-4:] == inside[:4]
        assert needle.num_answer == 5
        assert all(needle.ids.count(token) == 1 for token in inside[4:])
    assert len({needle.ids for needle in found}) == 12


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_masked_heads_add_nothing(kind):
    model, ids = model_of(kind), tokens(12)
    dense = logits(model, ids)
    with masked_heads(model, [(0, 1), (1, 0), (1, 3)]):
        found = logits(model, ids)
    assert torch.equal(logits(model, ids), dense)
    assert (found - dense).abs().max() > 1e-3
    names = {"gpt2": "transformer.h.{}.attn.c_proj"}
    with torch.no_grad():
        for layer, head in [(0, 1), (1, 0), (1, 3)]:
            module = model.get_submodule(names.get(kind, "model.layers.{}.self_attn.o_proj").format(layer))
            weight = module.weight.T if kind != "gpt2" else module.weight  # inputs first
            weight[8 * head : 8 * head + 8] = 0
    torch.testing.assert_close(logits(model, ids), found)
    with masked_heads(model, []):
        torch.testing.assert_close(logits(model, ids), found)


def test_a_kv_head_streams_unless_a_query_head_retrieves():
    scores = torch.tensor([[0.0, 0.1, 0.2, 0.0], [0.0, 0.0, 0.05, 0.0], [0.3, 0.0, 0.0, 0.9]])
    found = RetrievalHeads(window_size=7).policy(scores, 2)
    assert found == StreamingHeads(streaming=[[0], [0, 1], []], window_size=7)
    model, text = model_of("llama"), [tokens(200), tokens(150, seed=1)]
    search = RetrievalHeads(lengths=[60], num_depths=2, cue=4, answer=3)
    made = search.fit(model, text)
    assert made == search.fit(model, text)
    apply(model, made)


def test_bad_input():
    model = model_of("llama")
    with pytest.raises(InputError, match="needles must hold at least one prompt, got none"):
        retrieval_scores(model, [])
    with pytest.raises(InputError, match="length must be at least 40 and at most 25"):
        RetrievalHeads(lengths=[60]).fit(model, [tokens(9)])
    with pytest.raises(InputError, match="lengths must be at most the model's context of 256 tokens, got 308"):
        RetrievalHeads(lengths=[300]).fit(model, [tokens(900)])
    with pytest.raises(InputError, match="task must have one needle, got multi_value"):
        needle_prompts(byte_tokenizer(300), "x\n" * 900, tasks=("multi_value",), lengths=(900,))
    with (
        pytest.raises(InputError, match=r"heads must be of 2 layers with 4 heads, got \(0, \[4\]\)"),
        masked_heads(model, [(0, 4)]),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"heads must be of 2 layers with 4 heads, got \(2, \[0\]\)"),
        masked_heads(model, [(2, 0)]),
    ):
        pass
