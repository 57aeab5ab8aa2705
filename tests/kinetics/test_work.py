"""Counts: those of a real forward exactly, those of naive loops, and the paper's closed form."""

import pytest
import torch

from paucity.checks import InputError
from paucity.kinetics import Reading, Workload, block_topk, decode, eflops, generation, prefill, shape_of
from paucity.measure.flops import flops_by_operator


def real_flops(call):
    """Without the table of rotations, a product that is made once for all layers."""
    return sum(count for name, count in flops_by_operator(call).items() if name != "aten.bmm")


COUNTED = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "opt", "phi", "phi3")


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 7), (3, 12)])
def test_flops_of_a_real_prefill(tiny_model, name, batch, tokens):
    model = tiny_model(name)
    ids = torch.randint(64, (batch, tokens))
    shape = shape_of(model.config)
    with torch.no_grad():
        found = real_flops(lambda: model(ids, logits_to_keep=1, use_cache=False))
    assert prefill(shape, tokens, batch=batch).flops == found


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_flops_of_a_real_step(tiny_model, name):
    model = tiny_model(name)
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        found = real_flops(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True))
    assert decode(shape_of(model.config), 9, batch=2).flops == found


def naive(shape, context, steps, batch, trials, shared, option):
    """Step by step, layer by layer, trial by trial."""
    flops = num_bytes = search_flops = search_bytes = 0.0
    for step in range(1, steps + 1):
        for layer, window in enumerate(shape.windows):
            limit = window or 10**9
            seen = min(context + step, limit)
            own = min(step, limit)
            dense = option is None or layer < option.dense_layers
            read = seen if dense else min(seen, option.num_keys) if option.num_keys else seen * option.density
            for trial in range(batch * trials):
                flops += 2 * shape.heads * (shape.dim + shape.value_dim) * read
                again = shared and trial % trials
                item = shape.kv_heads * (shape.dim + shape.value_dim) * 2
                num_bytes += item * ((own if again else seen) if dense else read)
                if not dense and read < seen:
                    search_flops += 2 * shape.heads * shape.dim * seen * option.search_flops / option.search_every
                    looked = (own if again else seen) * option.search_bytes / option.search_every
                    search_bytes += 2 * shape.kv_heads * shape.dim * looked
    return flops, num_bytes, search_flops, search_bytes


OPTIONS = [
    None,
    block_topk(4, block_size=2),
    Reading(name="own", num_keys=9, search_bytes=0.5, search_flops=0.25, search_every=2, dense_layers=1),
    Reading(name="share", density=0.25, search_bytes=0.1),
]


@pytest.mark.parametrize("option", OPTIONS, ids=["dense", "block", "reused", "density"])
@pytest.mark.parametrize(
    ("context", "steps", "batch", "trials", "shared"),
    [(0, 1, 1, 1, True), (3, 4, 2, 1, True), (20, 30, 1, 3, True), (2, 11, 2, 3, False)],
)
def test_steps_match_naive_loops(shape, option, context, steps, batch, trials, shared):
    work = decode(shape, context, steps=steps, batch=batch, trials=trials, shared_prompt=shared, reading=option)
    flops, num_bytes, search_flops, search_bytes = naive(shape, context, steps, batch, trials, shared, option)
    assert work.attention.flops + work.listed.flops == pytest.approx(flops)
    assert work.attention.num_bytes + work.listed.num_bytes == pytest.approx(num_bytes)
    if option is None or not shared or trials == 1:  # which of the searched keys are the prompt's is known on average
        assert work.search.num_bytes == pytest.approx(search_bytes)
    assert work.search.flops == pytest.approx(search_flops)
    assert work.linear.flops == 2 * 900 * batch * trials * steps
    assert work.linear.num_bytes == 2 * 900 * steps


@pytest.mark.parametrize("trials", [1, 8])
def test_the_papers_formula(trials):
    """``2NPL + 2rN L_in D L + rNDL^2 + I (2 L_in D L + N D L^2)``, with L (L + 1) for L^2."""
    shape = shape_of("embedded")
    parameters, group, cache = shape.linear + shape.head, shape.group, shape.cache
    start, length, intensity = 300, 200, 562.5
    squared = length * (length + 1)
    wanted = 2 * trials * parameters * length
    wanted += group * trials * cache * (2 * start * length + squared)
    wanted += intensity * cache * (2 * start * length + trials * squared)
    work = decode(shape, start, steps=length, trials=trials)
    assert eflops(work, intensity) == pytest.approx(wanted)
    assert eflops(work, intensity, weights=True) == pytest.approx(wanted + intensity * 2 * parameters * length)


def test_what_grows_and_what_does_not(shape):
    costs = [decode(shape, context).reading.num_bytes for context in (0, 10, 100, 1000)]
    assert costs == sorted(set(costs))
    read = [decode(shape, 1000, reading=block_topk(keys)).listed.num_bytes for keys in (8, 16, 64, 2000)]
    assert read == sorted(set(read))
    far = [decode(shape, context, reading=Reading(name="window", num_keys=8)).reading for context in (100, 10**6)]
    assert far[0] == far[1]
    whole = decode(shape, 1000, reading=block_topk(2000))
    assert whole.reading == decode(shape, 1000).reading
    shared = decode(shape, 100, steps=5, trials=4)
    assert shared.attention.num_bytes < decode(shape, 100, steps=5, trials=4, shared_prompt=False).attention.num_bytes
    assert decode(shape, 100, steps=5, trials=4, shared_prompt=False) == decode(shape, 100, steps=5, batch=4)


def test_a_generation_is_one_prefill_and_its_steps(shape):
    first, steps = generation(shape, Workload(20, 10, batch=2, trials=3))
    assert first == prefill(shape, 20, batch=2)
    assert steps == decode(shape, 20, steps=10, batch=2, trials=3)


def test_bad_numbers(shape):
    with pytest.raises(InputError, match="tokens must be at least 1, got 0"):
        prefill(shape, 0)
    with pytest.raises(InputError, match="context must be at least 0, got -1"):
        decode(shape, -1)
    with pytest.raises(InputError, match="trials must be at least 1"):
        Workload(1, 1, trials=0)
    with pytest.raises(InputError, match="reading must leave some of the 3 layers sparse"):
        decode(shape, 9, reading=Reading(name="x", num_keys=1, dense_layers=3))
    with pytest.raises(InputError, match="intensity must be in"):
        eflops(decode(shape, 1), -1.0)
