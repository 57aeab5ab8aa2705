"""Dense decoding without copies says what transformers says."""

import pytest
import torch
from transformers import DynamicCache

from paucity.checks import InputError
from paucity.measure.dense import decode_step, filled_cache, random_llama, use_dense

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


def test_a_step_is_that_of_transformers():
    model = random_llama(torch.float32, context=64, **SIZES)
    cache = filled_cache(model.config, 9, batch=2, room=4, seed=1)
    copied = DynamicCache()
    for layer, own in enumerate(cache.layers):
        copied.update(own.keys.clone(), own.values.clone(), layer)
    ids = torch.randint(64, (2, 3))
    for step in range(3):
        with torch.no_grad():
            model.set_attn_implementation("sdpa")
            wanted = model(ids[:, step : step + 1], past_key_values=copied, use_cache=True).logits
            use_dense(model)
            found = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 12
    assert cache.layers[0].keys.data_ptr() == cache.layers[0].buffers[0].data_ptr()


def test_a_step_can_be_repeated():
    model = random_llama(torch.bfloat16, context=64, **SIZES)
    step = decode_step(model, 5, batch=3)
    first = step()
    assert first.shape == (3, 1, 64)
    for _ in range(3):  # there is room for one token
        assert torch.equal(step(), first)


def test_prefill_is_causal():
    model = random_llama(torch.float32, context=64, **SIZES)
    ids = torch.randint(64, (1, 8))
    with torch.no_grad():
        found = model(ids).logits
        torch.testing.assert_close(model(ids[:, :5]).logits, found[:, :5], atol=1e-5, rtol=1e-5)


def test_weights_leave_the_callers_numbers_alone():
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    random_llama(torch.float32, context=8, **SIZES)
    assert torch.equal(torch.rand(1), first)


def test_bad_input():
    with pytest.raises(InputError, match="model must be a transformers model, got Linear"):
        use_dense(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="length must be at least 0, got -1"):
        filled_cache(None, -1)
