"""SharedLLM by loops: the trees, what the lower model makes of them, and what the upper one reads."""

import copy
import dataclasses

import pytest
import torch
from pydantic import ValidationError
from transformers import GenerationConfig

from paucity.attention import SharedLLM, SharedOptions, SharedTraining
from paucity.attention.rotary import find_rotary
from paucity.attention.shared_llm.lower import LowerModel
from paucity.attention.shared_llm.tree import compressed_length, grow, kept_tokens, level_lengths
from paucity.checks import InputError

SMALL = SharedOptions(num_layers=1, chunk_size=16, ratios=[4, 2], start="copy")


def text(length, batch=1, seed=0):
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def naive_tree(start, length, level, height, goes_right, noise):
    """(level, start, length) of every preserved node of one chunk, by recursion."""
    if length < 2 or level == height:
        return [(level - 1, start, length)]
    selected = min(max(int((length / 2 - noise[level] * length) // 1), 1), length - 1)
    left = length - selected if goes_right[level] or level == height - 1 or selected < 2 else selected
    last = level == height - 1 or selected < 2
    if last:
        return [(level, start, left), (level, start + left, length - left)]
    if goes_right[level]:
        return [(level, start, left), *naive_tree(start + left, selected, level + 1, height, goes_right, noise)]
    rest = naive_tree(start, selected, level + 1, height, goes_right, noise)
    return [(level, start + left, length - left), *rest]


@pytest.mark.parametrize("seed", range(8))
def test_trees_are_those_of_the_recursion(seed):
    rng = torch.Generator().manual_seed(seed)
    length, rows, height = int(torch.randint(2, 65, (1,), generator=rng)), 5, 1 + seed % 4
    noise = (0.2 * torch.randn(height, generator=rng)).tolist() if seed % 2 else [0.0] * height
    turns = torch.rand(height, rows, generator=rng) < 0.5
    calls = iter(turns)
    nodes = grow(text(length, rows), [2] * height, lambda left, right: next(calls), noise)
    for row in range(rows):
        expected = sorted(naive_tree(0, length, 0, height, turns[:, row].tolist(), noise), key=lambda node: node[1])
        found = [(int(p[row, i, 0]), p.shape[2]) for p in (n.positions for n in nodes) for i in range(p.shape[1])]
        assert sorted(found) == [node[1:] for node in expected]
        every = torch.cat([level.positions[row].flatten() for level in nodes])
        assert every.sort().values.tolist() == list(range(length))


def test_the_choice_sees_both_halves_of_what_was_chosen_before():
    seen = []

    def left(first, second):
        seen.append((first.tolist(), second.tolist()))
        return torch.zeros(len(first), dtype=torch.bool)

    grow(torch.arange(8)[None], [4, 2, 1], left)
    assert seen == [([[0, 1, 2, 3]], [[4, 5, 6, 7]]), ([[0, 1]], [[2, 3]])]  # the last level keeps both


def test_defaults_compress_to_an_eighth_with_fine_tokens_at_the_end():
    options = SharedOptions()
    assert compressed_length(options.chunk_size, options.ratios) == 128
    nodes = grow(torch.zeros(1, 1024, dtype=torch.int64), options.ratios)
    assert [(n.positions[0, :, 0].tolist(), n.positions.shape[2], len(n.kept)) for n in nodes] == [
        ([0], 512, 32), ([512], 256, 32), ([768], 128, 32), ([896], 128, 32)
    ]  # fmt: skip
    assert kept_tokens(8, 4).tolist() == [3, 7]
    assert kept_tokens(7, 2).tolist() == [1, 3, 5, 6]
    assert kept_tokens(3, 16).tolist() == [2]
    assert level_lengths(1, 3) == []


@pytest.mark.parametrize("architecture_name", ["llama", "qwen3"])
def test_memory_is_what_the_layers_make_of_every_node_alone(tiny_model, architecture_name):
    model = tiny_model(architecture_name)
    shared = SharedLLM(model, SMALL.model_copy(update={"num_layers": 2}))
    ids = text(16 + 16 + 5, batch=2)  # the first chunk is shorter
    turns = [find_rotary(model, layer).turn for layer in range(2)]
    memory = shared.compress(ids)
    assert (memory.num_chunks, memory.num_tokens, memory.num_kept) == (3, 37, memory.keys[1].shape[2])
    for row in range(2):
        keys, values = [[], []], [[], []]
        for number, (begin, end) in enumerate([(0, 5), (5, 21), (21, 37)]):
            half = (end - begin) // 2
            middle = end - half
            cuts = [(begin, middle, 4), (middle, end - half // 2, 2), (end - half // 2, end, 2)]
            for start, stop, ratio in cuts:
                cache = model(ids[row : row + 1, start:stop], use_cache=True).past_key_values
                kept = kept_tokens(stop - start, ratio)
                for layer in range(2):
                    key = cache.layers[layer].keys[0][:, kept]
                    keys[layer].append(turns[layer](key, kept, torch.full_like(kept, number)))
                    values[layer].append(cache.layers[layer].values[0][:, kept])
        for layer in range(2):  # the order of keys does not matter
            for found, parts in ((memory.keys, keys), (memory.values, values)):
                found, wanted = found[layer][row].sum(1), torch.cat(parts[layer], 1).sum(1)
                torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_first_layers_keys_stand_at_the_number_of_their_chunk(tiny_model):
    model = tiny_model("llama")
    ids = text(32)
    key = SharedLLM(model, SMALL).compress(ids).keys[0][0]
    layer, inv_freq = model.model.layers[0], model.model.rotary_emb.inv_freq
    raw = layer.self_attn.k_proj(layer.input_layernorm(model.model.embed_tokens(ids[0]))).view(32, 2, 8)
    for number in range(2):
        angle = (number * inv_freq).repeat(2)
        x = raw[16 * number : 16 * (number + 1)]
        turned = x * angle.cos() + torch.cat([-x[..., 4:], x[..., :4]], -1) * angle.sin()
        kept = [3, 7, 9, 11, 13, 15]
        distance = torch.cdist(turned[kept].transpose(0, 1), key)  # each is one of the memory's
        assert distance.min(-1).values.max() < 1e-4


def test_cross_attention_by_loops(tiny_model):
    model = tiny_model("llama")
    shared = SharedLLM(model, SMALL)
    ids, memory = text(6, batch=2, seed=1), shared.compress(text(40, batch=2))
    layer, cross = model.model.layers[0], shared.crosses[0]
    hidden = model.model.embed_tokens(ids)
    rope = model.model.rotary_emb(hidden, torch.arange(6)[None])
    hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rope)[0]
    query, inv_freq = cross.q_proj(cross.norm(hidden)), model.model.rotary_emb.inv_freq
    angle = (memory.num_chunks * inv_freq).repeat(2)
    out = torch.zeros(2, 6, 32)
    for b in range(2):
        for head in range(4):
            for t in range(6):
                q = query[b, t, 8 * head : 8 * head + 8]
                q = q * angle.cos() + torch.cat([-q[4:], q[:4]]) * angle.sin()
                weights = (memory.keys[0][b, head // 2] @ q / 8**0.5).softmax(0)
                out[b, t, 8 * head : 8 * head + 8] = weights @ memory.values[0][b, head // 2]
    hidden = hidden + cross.o_proj(out)
    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    hidden = model.model.layers[1](hidden, position_embeddings=rope)
    torch.testing.assert_close(
        shared(ids, memory).logits, model.lm_head(model.model.norm(hidden)), atol=1e-4, rtol=1e-4
    )


def test_until_it_is_trained_it_is_the_model_and_the_models_are_left_alone(tiny_model):
    model, ids = tiny_model("llama"), text(20, batch=2)
    before = copy.deepcopy(model.state_dict())
    shared = SharedLLM(model, SMALL.model_copy(update={"start": "zero"}))
    assert torch.equal(shared(ids, text(50, batch=2)).logits, model(ids).logits)
    assert torch.equal(SharedLLM(model, SMALL)(ids).logits, model(ids).logits)
    assert not torch.allclose(SharedLLM(model, SMALL)(ids, text(50, batch=2)).logits, model(ids).logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in shared.modules())


def test_running_text_is_causal_and_rows_do_not_mix(tiny_model):
    shared = SharedLLM(tiny_model("llama"), SMALL)
    ids, context = text(12, batch=3), text(45, batch=3, seed=2)
    logits = shared(ids, context).logits
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 1) % 64
    changed = shared(other, context).logits
    torch.testing.assert_close(changed[:, :7], logits[:, :7])
    assert not torch.allclose(changed[:, 7:], logits[:, 7:])
    for row in range(3):
        torch.testing.assert_close(shared(ids[row : row + 1], context[row : row + 1]).logits[0], logits[row])
    few = SharedLLM(tiny_model("llama"), SMALL.model_copy(update={"parallel_chunks": 2}))
    few.load_state_dict(shared.state_dict())
    torch.testing.assert_close(few(ids, context).logits, logits)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_reads_the_context_at_every_step(tiny_model, beams):
    shared = SharedLLM(tiny_model("llama"), SMALL)
    ids, memory = text(5, batch=2), shared.compress(text(40, batch=2, seed=3))
    config = GenerationConfig(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0)
    out = shared.generate(ids, memory, config=config)
    assert out.shape == (2, 11)
    for row in range(2):
        keys, values = ([part[row : row + 1] for part in parts] for parts in (memory.keys, memory.values))
        alone = dataclasses.replace(memory, keys=tuple(keys), values=tuple(values))
        assert torch.equal(shared.generate(ids[row : row + 1], alone, config=config)[0], out[row])
    if beams == 1:
        wanted = ids
        for _ in range(6):
            logits = shared(wanted, memory).logits[:, -1]
            logits[:, 2] = -torch.inf  # the end, which min_new_tokens forbids
            wanted = torch.cat([wanted, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(out, wanted)


def test_the_query_leads_to_the_planted_half(tiny_model):
    model = tiny_model("llama")
    query = text(8, seed=5)
    chunks = torch.stack([text(16, seed=seed)[0] for seed in range(6, 10)])
    places = [0, 8, 8, 0]
    for row, place in zip(chunks, places, strict=True):
        row[place : place + 8] = query[0]
    lower = LowerModel(model.model, [find_rotary(model, 0)], [4, 2])
    choose = lower.nearest(lower.sketch(query).expand(4, -1))
    fine = grow(chunks, [4, 2], choose)[-1].positions[:, 0, 0]
    assert (fine // 8 * 8).tolist() == places
    shared = SharedLLM(model, SMALL)
    searched, straight = (shared.compress(chunks.view(1, 64), q) for q in (query, None))
    assert searched.num_kept == straight.num_kept
    assert not torch.allclose(searched.values[0].sum(2), straight.values[0].sum(2))


def test_training_changes_only_what_it_should(tiny_model):
    shared = SharedLLM(tiny_model("llama"), SMALL)
    before = copy.deepcopy(shared.state_dict())
    frozen = {name: weight.requires_grad for name, weight in shared.named_parameters()}
    training = SharedTraining(running_length=12, batch_size=4, micro_batch=2, num_steps=12, learning_rate=1e-2)
    losses = shared.fit(text(44, batch=4).sort(-1).values, training)
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.1
    changed = {name for name, value in shared.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(shared.trained_parameters())
    assert {name.rpartition(".layers.")[2].partition(".")[0] for name in changed if name.startswith("upper")} == {"1"}
    assert {name: weight.requires_grad for name, weight in shared.named_parameters()} == frozen
    assert all(weight.grad is None for weight in shared.parameters())
    assert not shared.training
    assert all(name.startswith("crosses.") for name in shared.trained_parameters(top=False))


def test_steps_do_not_depend_on_how_a_batch_is_divided(tiny_model):
    model, windows = tiny_model("llama"), text(44, batch=4)
    found = []
    for micro in (1, 3, 4):
        shared = SharedLLM(model, SMALL)
        options = {"running_length": 12, "batch_size": 4, "num_steps": 2, "learning_rate": 1e-2, "noise": 0.0}
        losses = shared.fit(windows, SharedTraining(micro_batch=micro, **options))
        found.append((torch.tensor(losses), shared(windows[:, 32:], windows[:, :32]).logits))
    for losses, logits in found[1:]:
        torch.testing.assert_close(losses, found[0][0])
        torch.testing.assert_close(logits, found[0][1], atol=1e-3, rtol=1e-3)


def test_bfloat16_forwards_learn_the_same(tiny_model):
    model, windows = tiny_model("llama"), text(44, batch=4)
    options = {"running_length": 12, "batch_size": 4, "micro_batch": 4, "num_steps": 16, "learning_rate": 1e-2}
    found = []
    for autocast in (False, True):
        losses = SharedLLM(model, SMALL).fit(windows, SharedTraining(autocast=autocast, **options))
        found.append(torch.tensor(losses))
    assert found[0][-1] < found[0][0] - 0.15
    torch.testing.assert_close(found[1], found[0], atol=0.05, rtol=0)


def test_a_sliding_window_does_not_cut_nodes(tiny_model):
    options = SharedOptions(num_layers=2, chunk_size=80, ratios=[2, 1])
    memory = SharedLLM(tiny_model("mistral"), options).compress(text(160))  # nodes of 40 tokens, a window of 16
    assert memory.num_kept == 2 * (20 + 20 + 20) == 2 * compressed_length(80, [2, 1])


def test_saved_and_loaded(tiny_model, tmp_path):
    model = tiny_model("llama")
    shared = SharedLLM(model, SMALL)
    shared.fit(text(44, batch=2), SharedTraining(running_length=12, batch_size=2, num_steps=2, learning_rate=1e-2))
    again = SharedLLM.load(shared.save(tmp_path / "deep" / "er"), model)
    ids, context = text(9), text(33)
    assert again.options == shared.options
    assert torch.equal(again(ids, context).logits, shared(ids, context).logits)
    with pytest.raises(InputError, match="load: model must be the one that was saved"):
        SharedLLM.load(tmp_path / "deep" / "er", tiny_model("qwen2"))
    with pytest.raises(InputError, match=r"load: folder must hold shared_llm\.safetensors"):
        SharedLLM.load(tmp_path, model)


def test_low_precision_becomes_float32_and_a_copy_works_alone(tiny_model):
    shared = copy.deepcopy(SharedLLM(tiny_model("llama").bfloat16(), SMALL))
    assert {weight.dtype for weight in shared.parameters()} == {torch.float32}
    assert shared.bfloat16()(text(9), text(33)).logits.isfinite().all()


def test_bad_input_is_refused(tiny_model):
    model = tiny_model("llama")
    shared = SharedLLM(model, SMALL)
    with pytest.raises(InputError, match="model must be a causal language model laid out as Llama is, got GPT2"):
        SharedLLM(tiny_model("gpt2"), SMALL)
    with pytest.raises(InputError, match="laid out as Llama is, got Gemma2"):
        SharedLLM(tiny_model("gemma2"), SMALL)
    with pytest.raises(InputError, match="num_layers must be at most the model's 2 layers, got 4"):
        SharedLLM(model)
    with pytest.raises(InputError, match="context_ids must hold at least one token"):
        shared.compress(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(InputError, match=r"query_ids must have shape \[2, any\], got \[1, 4\]"):
        shared.compress(text(20, batch=2), text(4))
    with pytest.raises(InputError, match="context must have 2 texts, got 1"):
        shared(text(5, batch=2), text(20))
    with pytest.raises(InputError, match="context must be compressed in 1 layers, got 2"):
        shared(text(5), SharedLLM(model, SMALL.model_copy(update={"num_layers": 2})).compress(text(20)))
    with pytest.raises(InputError, match=r"length of windows must be in \[13, inf\)"):
        shared.fit(text(12), SharedTraining(running_length=12))
    for wrong in ({"ratios": []}, {"ratios": [0]}, {"chunk_size": 4, "ratios": [4, 2, 1]}, {"other": 1}):
        with pytest.raises((ValidationError, InputError)):
            SharedOptions(**wrong)


def test_a_folder_with_other_files_is_left_alone(tiny_model, tmp_path):
    shared = SharedLLM(tiny_model("llama"), SMALL)
    shared.save(tmp_path)
    shared.save(tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match=r"save: folder must hold nothing else .* with mine"):
        shared.save(tmp_path)
    assert shared.save(tmp_path, force=True) == tmp_path
    with pytest.raises(InputError, match="save: folder must be a folder"):
        shared.save(tmp_path / "mine")
