"""Gram matrices: twins against float64 products, at odd sizes, in poisoned memory."""

import pytest
import torch

from paucity.checks import InputError, InputTypeError
from paucity.kernels.gram import add_gram, add_squares, empty_gram, reference


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (7, 3), (63, 100), (513, 49), (1030, 160), (0, 5)])
def test_matches_the_product(monkeypatch, kernels, dtype, tokens, size):
    monkeypatch.setenv("PAUCITY_KERNELS", kernels)
    inputs, gram = torch.randn(tokens, size).to(dtype), empty_gram(size)
    add_gram(gram, inputs[: tokens // 3])
    add_gram(gram, inputs[tokens // 3 :])
    expected = inputs.double().T @ inputs.double()
    torch.testing.assert_close(gram.tril(), expected.tril().float(), rtol=1e-4, atol=1e-4 * max(1, tokens) ** 0.5)


def test_nothing_outside_is_touched():
    size = 37
    held = torch.full((size + 2, 48), torch.nan)
    gram = held[1:-1, :size]
    gram.zero_()
    inputs = torch.randn(100, size + 3).bfloat16()[:, :size]  # rows that are not packed
    add_gram(gram, inputs)
    assert held[0].isnan().all()
    assert held[-1].isnan().all()
    torch.testing.assert_close(gram.tril(), (inputs.float().T @ inputs.float()).tril(), rtol=1e-4, atol=1e-3)
    tight = torch.zeros(size, size)
    add_gram(tight, inputs)
    torch.testing.assert_close(tight.tril(), gram.tril(), rtol=1e-4, atol=1e-3)


def test_panels(monkeypatch):
    monkeypatch.setattr(reference, "PANEL", 5)
    inputs, gram = torch.randn(20, 23), torch.zeros(23, 23)
    reference.add(gram, inputs)
    torch.testing.assert_close(gram.tril(), (inputs.T @ inputs).tril(), rtol=1e-5, atol=1e-5)


def test_bad_input():
    with pytest.raises(InputError, match=r"gram must have shape \[3, 3\], got \[4, 4\]"):
        add_gram(empty_gram(4), torch.ones(2, 3))
    with pytest.raises(InputTypeError, match=r"gram must be torch.float32"):
        add_gram(torch.zeros(3, 3).double(), torch.ones(2, 3))
    with pytest.raises(InputError, match="gram must have contiguous rows"):
        add_gram(torch.zeros(3, 6)[:, ::2], torch.ones(2, 3))
    with pytest.raises(InputError, match="squares must be contiguous"):
        add_squares(torch.zeros(6).double()[::2], torch.ones(2, 3))
    with pytest.raises(InputTypeError, match="inputs"):
        add_gram(empty_gram(3), torch.ones(2, 3).long())


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (7, 3), (63, 100), (1030, 16), (0, 5), (5, 0)])
def test_squares_are_the_diagonal(monkeypatch, kernels, dtype, tokens, size):
    monkeypatch.setenv("PAUCITY_KERNELS", kernels)
    inputs, squares = torch.randn(tokens, size + 2).to(dtype)[:, :size], torch.ones(size, dtype=torch.float64)
    add_squares(squares, inputs)
    torch.testing.assert_close(squares, 1 + inputs.double().square().sum(0), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="squares must have shape"):
        add_squares(torch.zeros(size + 1).double(), inputs)
    with pytest.raises(InputTypeError, match=r"squares must be torch.float64"):
        add_squares(torch.zeros(size), inputs)
