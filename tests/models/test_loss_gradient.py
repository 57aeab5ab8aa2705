"""The gradient of a model's loss at a place, against that to what is added there, in the order of the tokens."""

import pytest
import torch

from paucity.checks import InputError
from paucity.models.harvest import harvest
from paucity.models.loss_gradient import harvest_gradients
from paucity.models.places import find_hook
from paucity.models.substitute import substituted


@pytest.mark.parametrize("place", ["residual.0", "mlp.1", "heads.0"])
def test_it_is_the_gradient_to_what_is_added_there(tiny_model, place):
    model = tiny_model("llama").double()
    ids = torch.randint(3, 60, (2, 7))
    hook = find_hook(model, place)
    x, gradient = harvest_gradients(model, hook, ids)
    torch.testing.assert_close(x, harvest(model, [hook], ids[:, :-1])[place])
    added = torch.zeros(2, 6, x.shape[1], dtype=x.dtype, requires_grad=True)
    with substituted(model, hook, lambda v: v + added):
        logits = model(input_ids=ids[:, :-1]).logits.float()
    loss = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()
    (expected,) = torch.autograd.grad(loss, added)
    torch.testing.assert_close(gradient, expected.flatten(0, 1), rtol=1e-5, atol=1e-7)
    assert float(gradient.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_are_left_out(tiny_model):
    model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7, 5, 8]])
    hook = find_hook(model, "residual.0")
    x, gradient = harvest_gradients(model, hook, ids)
    some, their = harvest_gradients(model, hook, ids, skip_ids=[5])
    assert torch.equal(some, x[[1, 2]])
    assert torch.equal(their, gradient[[1, 2]])


def test_bad_input(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(InputError, match="at least 2 tokens"):
        harvest_gradients(model, find_hook(model, "residual.0"), torch.tensor([[1]]))
    with pytest.raises(InputError, match="hook must be no single head"):
        harvest_gradients(model, find_hook(model, "heads.0.1"), torch.tensor([[1, 2, 3]]))
