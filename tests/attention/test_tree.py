"""Token trees: what each token sees, where it stands, and passes over a tree in whole models."""

import pytest
import torch
from transformers import DynamicCache

from paucity.attention.speculation import tree_attention, tree_mask, tree_positions
from paucity.attention.speculation.passes import NAME, keep_path, text_pass, tree_pass, tree_passes
from paucity.attention.speculation.tree import tree_pattern
from paucity.checks import InputError


def naive_seen(parents, num_keys, window):
    """The definition, token by token; positions too."""
    first = num_keys - len(parents)
    place = list(range(first)) + [0] * len(parents)
    above = [list(range(i + 1)) for i in range(first)]  # of each key: itself and what comes before it on its path
    for i, parent in enumerate(parents):
        above.append(([] if parent < 0 else above[parent]) + [first + i])
        place[first + i] = len(above[-1]) - 1
    mask = torch.zeros(len(parents), num_keys, dtype=torch.bool)
    for i in range(len(parents)):
        for j in above[first + i]:
            mask[i, j] = window is None or place[first + i] - place[j] < window
    return mask, torch.tensor(place[first:])


def random_parents(size, text, *, near):
    low = max(-1, text - 3) if near else -1
    return [int(torch.randint(low if i == 0 or not near else text, text + i, ())) for i in range(size)]


SIZES = [(1, 0), (1, 1), (5, 0), (6, 7), (9, 150), (70, 64), (70, 130)]


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(("size", "text"), SIZES)
def test_mask_pattern_and_positions_are_those_of_the_definition(size, text, window, near):
    rows = [random_parents(size, text, near=near) for _ in range(2)]
    parents, keys = torch.tensor(rows), size + text
    wanted = [naive_seen(row, keys, window) for row in rows]
    mask = tree_mask(parents, keys, window=window)
    assert torch.equal(mask, torch.stack([seen for seen, _ in wanted]))
    assert torch.equal(tree_positions(parents, keys), torch.stack([place for _, place in wanted]))
    assert torch.equal(tree_pattern(parents, keys, window=window).to_dense(), mask[:, None])
    assert torch.equal(tree_mask(parents[0], keys, window=window), mask[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "text"), [(1, 0), (9, 63), (33, 100)])
def test_attention_is_softmax_over_what_is_seen(size, text, dtype):
    parents, keys = torch.tensor(random_parents(size, text, near=True)), size + text
    query = torch.randn(2, 4, size, 8, dtype=dtype, requires_grad=True)
    key, value = torch.randn(2, 2, keys, 8, dtype=dtype), torch.randn(2, 2, keys, 6, dtype=dtype)
    padding = torch.ones(2, keys, dtype=torch.bool)
    padding[1, : text // 2] = False
    out = tree_attention(query, key, value, parents, scale=0.3, softcap=5.0, padding=padding, window=40)
    logits = torch.einsum("bgqtd,bgkd->bgqtk", query.view(2, 2, 2, size, 8), key).flatten(1, 2) * 0.3
    seen = tree_mask(parents, keys, window=40)[:, None] & padding[:, None, None]
    wanted = (5 * torch.tanh(logits / 5)).masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(out, wanted)
    grads = [torch.autograd.grad(x.square().sum(), query)[0] for x in (out, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("architecture_", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "phi3"])
def test_a_pass_over_a_tree_gives_every_path_what_it_gives_alone(tiny_model, architecture_):
    model = tiny_model(architecture_)
    ids, tree, parents = torch.randint(3, 64, (1, 21)), torch.randint(3, 64, (1, 6)), [-1, 0, 0, 1, 2, 3]
    cache, before = DynamicCache(), model.config._attn_implementation
    with torch.no_grad(), tree_passes(model):
        text_pass(model, cache, ids)
        embeddings = model.get_input_embeddings()(tree)
        logits = tree_pass(model, cache, embeddings, torch.tensor(parents) + ids.shape[1])
    assert model.config._attn_implementation == before != NAME
    for path in ([0], [0, 1], [0, 2, 4], [0, 1, 3, 5]):
        alone = model(torch.cat([ids, tree[:, path]], dim=1)).logits[:, -1]
        torch.testing.assert_close(logits[:, path[-1]], alone, atol=1e-4, rtol=1e-4)
    keep_path(cache, 6, torch.tensor([0, 2, 4]))
    with torch.no_grad():
        after = text_pass(model, cache, torch.tensor([[5]]))[:, -1]
    alone = model(torch.cat([ids, tree[:, [0, 2, 4]], torch.tensor([[5]])], dim=1)).logits[:, -1]
    torch.testing.assert_close(after, alone, atol=1e-4, rtol=1e-4)


def test_a_tree_behind_padding_is_the_tree_without(tiny_model):
    model = tiny_model("llama")
    ids, tree = torch.randint(3, 64, (2, 9)), torch.randint(3, 64, (2, 4))
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, :4] = False
    parents, cache, alone = torch.tensor([-1, 0, 0, 2]), DynamicCache(), DynamicCache()
    with torch.no_grad(), tree_passes(model):
        embeddings = model.get_input_embeddings()(tree)
        text_pass(model, cache, ids, padding=padding)
        both = tree_pass(model, cache, embeddings, parents + 9, padding=padding)
        text_pass(model, alone, ids[1:, 4:])
        one = tree_pass(model, alone, embeddings[1:], parents + 5)
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=1e-5)


def test_bad_input(tiny_model):
    query = torch.randn(1, 2, 3, 4)
    with pytest.raises(InputError, match=r"parents must come before their children, got \[0, 1, 4\]"):
        tree_attention(query, torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.tensor([0, 1, 4]))
    with pytest.raises(InputError, match=r"parents must be torch\.int64"):
        tree_mask(torch.zeros(3), 5)
    with pytest.raises(InputError, match="num_keys must be at least 3"):
        tree_mask(torch.tensor([-1, -1, -1]), 2)
    with pytest.raises(InputError, match="parents must be for 1 rows of 3 tokens"):
        tree_attention(query, torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.tensor([0, 1]))
    model = tiny_model("mistral")
    sliding = DynamicCache(config=model.config)
    with torch.no_grad():
        text_pass(model, sliding, torch.randint(3, 64, (1, 30)))
    with tree_passes(model), pytest.raises(InputError, match="cache must keep every token"):
        tree_pass(model, sliding, torch.randn(1, 2, 32), torch.tensor([29, 30]))
