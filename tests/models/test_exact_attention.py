"""Calibration through our own attention: the same numbers as through PyTorch's, and nothing of it stays."""

import pytest
import torch

from paucity.models.exact_attention import NAME, exact_attention
from paucity.models.text_config import text_config


@torch.no_grad()
def test_every_architecture_computes_the_same(tiny_model, architecture):
    model, ids = tiny_model(architecture), torch.randint(0, 64, (2, 33))
    before, implementation = model(ids).logits, text_config(model)._attn_implementation
    with exact_attention(model):
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-4)
        padded = torch.ones_like(ids)
        padded[0, :5] = 0
        masked = model(ids, attention_mask=padded).logits
    assert text_config(model)._attn_implementation == implementation
    torch.testing.assert_close(masked[:, 5:], model(ids, attention_mask=padded).logits[:, 5:], rtol=1e-3, atol=1e-4)


def test_gradients_flow_and_other_modules_are_left_alone(tiny_model):
    model, ids = tiny_model("llama"), torch.randint(0, 64, (1, 9))
    loss = model(ids, labels=ids).loss
    wanted = torch.autograd.grad(loss, model.model.layers[0].self_attn.k_proj.weight)[0]
    with exact_attention(model):
        assert text_config(model)._attn_implementation == NAME
        found = torch.autograd.grad(model(ids, labels=ids).loss, model.model.layers[0].self_attn.k_proj.weight)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    with exact_attention(torch.nn.Linear(2, 2)), exact_attention(torch.nn.Identity()):
        pass
    with pytest.raises(KeyboardInterrupt), exact_attention(model):
        raise KeyboardInterrupt
    assert text_config(model)._attn_implementation == "sdpa"
