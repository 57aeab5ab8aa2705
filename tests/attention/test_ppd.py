"""Prompt tokens and dynamic sparse trees: builder against brute force, training, lossless decoding."""

import itertools

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache

from paucity.attention import SinkWindow, apply
from paucity.attention.decode import OracleTopK
from paucity.attention.speculation import (
    DynamicTree,
    PromptTokens,
    TreeState,
    TypicalAcceptance,
    accept_probabilities,
    dynamic_tree,
    full_tree,
    hardware_aware_tree,
    measure_tree_latency,
    prompt_decode,
    random_tree,
    static_tree,
    train_prompt_tokens,
)
from paucity.attention.speculation.candidates import best_paths, last_accepted, place_prompts
from paucity.attention.speculation.passes import text_pass
from paucity.attention.speculation.sparse_tree import evaluate
from paucity.checks import InputError

TABLE = torch.tensor([[0.5, 0.2, 0.1], [0.3, 0.2, 0.05]])


def chance(table, path):
    return torch.tensor([table[i, r] for i, r in enumerate(path)]).prod().item() if path else 1.0


def all_paths(table, depth):
    return [p for d in range(depth + 1) for p in itertools.product(range(table.shape[1]), repeat=d)]


def closed_sets(table, depth, count):
    """Every tree with the root and ``count`` candidates in all."""
    for chosen in itertools.combinations(all_paths(table, depth), count):
        if all(not path or path[:-1] in chosen for path in chosen) and () in chosen:
            yield chosen


def long_run(table, states):
    """Tokens a step, by following the chain of states for long."""
    share, total = torch.full((len(states),), 1 / len(states), dtype=torch.float64), 0.0
    for turn in range(400):
        following = torch.zeros_like(share)
        gained = 0.0
        for number, state in enumerate(states):
            for node, path in enumerate(state.paths):
                gained += share[number].item() * chance(table, path)
                last = chance(table, path) - sum(chance(table, p) for p in state.paths if p and p[:-1] == path)
                following[state.prompts[node]] += share[number] * last
        share = following / following.sum()
        total += gained if turn >= 200 else 0.0
    return total / 200


@pytest.mark.parametrize(("depth", "count"), [(0, 1), (1, 3), (2, 1), (2, 2), (2, 4), (2, 6)])
def test_the_most_probable_candidates_are_the_best_tree_of_their_number(depth, count):
    found = best_paths(TABLE, depth, count)
    best = max(sum(chance(TABLE, p) for p in paths) for paths in closed_sets(TABLE, depth, len(found)))
    assert sum(c for _, c in found) == pytest.approx(best)
    assert [c for _, c in found] == pytest.approx([chance(TABLE, p) for p, _ in found])
    assert sum(last_accepted(found)) == pytest.approx(1.0)


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_prompt_tokens_lie_where_they_gain_most(count):
    last, worth = [0.4, 0.3, 0.2, 0.1], [0.0, 0.5, 0.7]
    gain = lambda placed: sum(c * worth[k] for c, k in zip(last, placed, strict=True))  # noqa: E731
    every = (p for p in itertools.product(range(3), repeat=4) if sum(p) <= count)
    assert gain(place_prompts(last, worth, count)) == pytest.approx(max(map(gain, every)))


def test_the_expected_gain_is_what_the_chain_gives_in_the_long_run():
    for tree in (dynamic_tree(TABLE, 7), static_tree(TABLE, 7), random_tree(TABLE, 8, seed=3)):
        assert tree.expected == pytest.approx(long_run(TABLE, tree.states), rel=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_dynamic_tree_is_the_best_of_all_trees(size):
    table = TABLE[:, :2]
    ways = []
    for depth in range(3):
        shapes = [paths for count in range(1, size + 1) for paths in closed_sets(table, depth, count)]
        places = [(paths, placed) for paths in shapes for placed in itertools.product(range(3), repeat=len(paths))]
        ways.append([TreeState(paths, placed) for paths, placed in places if sum(placed) + len(paths) <= size])
    tree = dynamic_tree(table, size)
    # No state alone can be changed for the better, whatever it is changed to; for small sizes, nor all at once.
    for number, others in enumerate(ways):
        for other in others:
            changed = [*tree.states[:number], other, *tree.states[number + 1 :]]
            assert evaluate(table, changed)[0] <= tree.expected + 1e-9
    if size <= 3:
        best = max(evaluate(table, states)[0] for states in itertools.product(*ways))
        assert tree.expected == pytest.approx(best, rel=1e-9)
    assert tree.size <= size


def test_dynamic_trees_gain_at_least_what_others_do_and_more_with_size():
    table = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)).sort(1, descending=True).values / 6
    grown = [dynamic_tree(table, size).expected for size in (4, 8, 16, 32)]
    assert grown == sorted(grown)
    for size, mine in zip((4, 8, 16, 32), grown, strict=True):
        others = (static_tree(table, size), full_tree(table, size), random_tree(table, size))
        assert all(other.expected <= mine + 1e-9 and other.size <= size for other in others)


def test_the_hardware_decides_the_size():
    trees = {size: dynamic_tree(TABLE, size) for size in (1, 4, 8)}
    assert hardware_aware_tree(TABLE, {1: 1.0, 4: 1.0, 8: 1.0}) == trees[8]
    assert hardware_aware_tree(TABLE, {1: 1.0, 4: 1.2, 8: 4.0}) == trees[4]
    assert hardware_aware_tree(TABLE, {1: 1.0, 4: 4.0, 8: 8.0}) == trees[1]


def test_training_lowers_the_loss_and_leaves_the_model_alone(tiny_model):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = [torch.randint(3, 64, (2, 24)) for _ in range(2)]
    prompts, losses = train_prompt_tokens(model, texts, num_prompts=2, num_ensemble=2, num_steps=30, num_places=24)
    assert prompts.embeddings.shape == (2, 2, 32)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again, same = train_prompt_tokens(model, texts, num_prompts=2, num_ensemble=2, num_steps=1, num_places=24)
    other, _ = train_prompt_tokens(model, texts, num_prompts=2, num_ensemble=2, num_steps=1, num_places=24, seed=1)
    assert same[0] == losses[0]
    assert not torch.equal(again.embeddings, other.embeddings)


def test_the_loss_is_the_divergence_from_the_greedy_continuation(tiny_model):
    """One place, one text: the definition with plain passes over whole texts."""
    model, ids = tiny_model("llama"), torch.randint(3, 64, (1, 7))
    prompts, losses = train_prompt_tokens(model, [ids[:, :1]], num_prompts=2, num_steps=1, learning_rate=1e-9)
    text = ids[:, :1]
    start = torch.cat([model.get_input_embeddings()(text), prompts.embeddings[:, 0][None]], dim=1)
    guess = model(inputs_embeds=start).logits[0, 1:].log_softmax(-1)
    wanted = 0.0
    for distance in range(2):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
        teacher = model(text).logits[0, -1].log_softmax(-1)
        wanted += 0.8**distance * (teacher.exp() * (teacher - guess[distance])).sum().item() / 2
    assert losses[0] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("architecture_", ["llama", "qwen3", "gpt2", "mistral"])
@pytest.mark.parametrize(("prompt", "new"), [(1, 1), (1, 12), (9, 2), (20, 20)])
def test_decoding_is_greedy_decoding(tiny_model, architecture_, prompt, new):
    model = tiny_model(architecture_)
    ids = torch.randint(3, 64, (1, prompt))
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0
    )
    prompts = PromptTokens(torch.randn(2, 2, 32))
    # Random prompt tokens guess badly: with all 64 tokens as candidates a guess is always right.
    wide = torch.full((2, 64), 1 / 64)
    trees = dynamic_tree(TABLE, 9, num_ensemble=2), static_tree(wide, 64 * 5 + 5, num_ensemble=2)
    for tree in trees:
        found = prompt_decode(model, ids, prompts=prompts, tree=tree, max_new_tokens=new)
        assert torch.equal(found.tokens, wanted)
        assert int(found.advanced.sum()) >= found.tokens.shape[1] - prompt - 1
    if new == 20 and wanted.shape[1] == 40:
        assert found.tokens_per_step > 1.5
        assert int(found.accepted.sum()) == int(found.advanced.sum()) - len(found.advanced)


def test_decoding_stops_at_the_end_and_typical_acceptance_keeps_more(tiny_model):
    model = tiny_model("llama")
    ids = torch.randint(3, 64, (1, 6))
    free = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=None
    )
    end = int(free[0, 10])
    wide = static_tree(torch.full((2, 64), 1 / 64), 200)
    options = {"prompts": PromptTokens(torch.randn(2, 1, 32)), "tree": wide, "max_new_tokens": 20}
    stopped = prompt_decode(model, ids, eos_token_id=[end, 99], **options).tokens
    first = (free[0, 6:] == end).nonzero()[0].item() + 6
    assert torch.equal(stopped, free[:, : first + 1])
    exact = prompt_decode(model, ids, eos_token_id=[], **options)
    loose = prompt_decode(model, ids, eos_token_id=[], typical=TypicalAcceptance(epsilon=1e-6), **options)
    assert torch.equal(exact.tokens, free)
    assert loose.tokens.shape == free.shape
    assert loose.tokens_per_step > exact.tokens_per_step
    sharp = prompt_decode(model, ids, eos_token_id=[], typical=TypicalAcceptance(alpha=1e6, epsilon=0.999), **options)
    assert torch.equal(sharp.tokens, free)


def test_a_prefill_policy_rules_the_prompt_alone_and_others_are_refused(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(3, 64, (1, 40))
    options = {"prompts": PromptTokens(torch.randn(2, 1, 32)), "tree": dynamic_tree(TABLE, 9), "max_new_tokens": 20}
    applied = apply(model, SinkWindow(min_length=0, num_sinks=0, window_size=4))
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    assert torch.equal(prompt_decode(model, ids, **options).tokens, wanted)
    applied.remove()
    assert not torch.equal(prompt_decode(model, ids, **options).tokens, wanted)
    applied = apply(model, OracleTopK())
    with pytest.raises(InputError, match="model must carry no decode or eviction policy"):
        prompt_decode(model, ids, **options)
    applied.remove()


def test_probabilities_are_the_share_of_right_guesses(tiny_model):
    model = tiny_model("llama")
    prompts = PromptTokens(torch.randn(1, 1, 32))
    ids = torch.randint(3, 64, (1, 10))
    table = accept_probabilities(model, prompts, [ids], top_k=64, num_places=10)
    assert table.sum(1) == pytest.approx(1.0)
    ranks = []
    for place in range(1, 11):
        text, cache = ids[:, :place], DynamicCache()
        with torch.no_grad():
            following = torch.cat([text, text_pass(model, cache, text, keep=1).argmax(-1)], dim=1)
            right = model(following).logits[0, -1].argmax()
            start = torch.cat([model.get_input_embeddings()(text), prompts.embeddings[:, 0][None]], dim=1)
            order = model(inputs_embeds=start).logits[0, -1].argsort(descending=True)
        ranks.append((order == right).nonzero().item())
    assert (table[0] * 10).round().tolist() == torch.tensor(ranks).bincount(minlength=64).tolist()


def test_prompt_tokens_are_saved_and_latency_is_measured(tiny_model, tmp_path):
    prompts = PromptTokens(torch.randn(3, 1, 8))
    prompts.save(tmp_path / "prompts.safetensors")
    assert torch.equal(PromptTokens.load(tmp_path / "prompts.safetensors").embeddings, prompts.embeddings)
    latency = measure_tree_latency(tiny_model("gpt2"), [1, 8], context=16, repeats=1)
    assert list(latency) == [1, 8]
    assert min(latency.values()) > 0


def test_bad_input(tiny_model):
    model, prompts = tiny_model("llama"), PromptTokens(torch.randn(2, 1, 32))
    tree, ids = dynamic_tree(TABLE, 4), torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(InputError, match="input_ids must have one row of tokens"):
        prompt_decode(model, ids.expand(2, -1), prompts=prompts, tree=tree, max_new_tokens=4)
    with pytest.raises(InputError, match="tree must be for 2 prompt tokens, got 1"):
        prompt_decode(model, ids, prompts=prompts, tree=DynamicTree(tree.states[:2], 1.0), max_new_tokens=4)
    with pytest.raises(InputError, match="max_new_tokens must be at most the model's context of 256"):
        prompt_decode(model, ids, prompts=prompts, tree=tree, max_new_tokens=254)
    with pytest.raises(InputError, match="accept must hold chances"):
        dynamic_tree(torch.ones(2, 3), 4)
    with pytest.raises(InputError, match="size must be at least 3"):
        static_tree(TABLE, 2)
    with pytest.raises(InputError, match=r"latency\[4\] must be in \(0"):
        hardware_aware_tree(TABLE, {4: 0.0})
    with pytest.raises(InputError, match="calibration must hold at least one text"):
        train_prompt_tokens(model, [])
    with pytest.raises(InputError, match="decay must be in"):
        train_prompt_tokens(model, [ids], decay=0.0)
    with pytest.raises(InputError, match="top_k must be in"):
        accept_probabilities(model, prompts, [ids], top_k=65)


def test_what_is_no_file_of_prompt_tokens_is_refused(tmp_path):
    (tmp_path / "text").write_text("nothing")
    save_file({"weight": torch.ones(2)}, tmp_path / "other")
    for name, message in (("absent", "which is no file"), ("text", "text"), ("other", r"with weight \[2\]")):
        with pytest.raises(InputError, match=f"load: path must be a file that save wrote, got .*{message}"):
            PromptTokens.load(tmp_path / name)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    def half(tensors, path):
        path.write_text("half")
        raise OSError("disk full")

    path, prompts = tmp_path / "prompts", PromptTokens(torch.ones(1, 1, 2))
    prompts.save(path)
    monkeypatch.setattr("paucity.attention.speculation.prompt_tokens.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        prompts.save(path)
    assert torch.equal(PromptTokens.load(path).embeddings, prompts.embeddings)
