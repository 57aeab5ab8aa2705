"""Decode attention as an operator: gradients, fake implementation, compilation."""

import math

import pytest
import torch

from paucity.kernels.decode import decode_attention
from paucity.kernels.decode.op import attend


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 2, 5), (2, 2, 11, 5), (2, 2, 11, 3))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


PAGES = torch.tensor([[[3, -1, 0], [1, 2, -1]], [[-1, -1, -1], [5, 0, 3]]])
OPTIONS = {
    "page_size": 2,
    "lengths": torch.tensor([10, 11]),
    "padding": torch.arange(11) >= torch.tensor([[0], [1]]),
    "softcap": 2.0,
}
STARTED = {"starts": torch.tensor([[0, 2], [3, 1]]), "lengths": torch.tensor([[10, 9], [8, 4]])}


def dense(query, key, value, sinks=None):
    """The same by a mask over all keys, for autograd of PyTorch."""
    mask = torch.zeros(2, 2, 2, 11, dtype=torch.bool)
    for b in range(2):
        for h in range(2):
            for page in PAGES[b, h].tolist():
                mask[b, h, :, max(page, 0) * 2 : page * 2 + 2] |= page >= 0
    at, stands = torch.arange(11), OPTIONS["lengths"].view(2, 1, 1, 1) - 2 + torch.arange(2).unsqueeze(-1)
    mask &= (at <= stands) & OPTIONS["padding"][:, None, None]
    mask = mask.repeat_interleave(2, dim=1)
    logits = query @ key.repeat_interleave(2, dim=1).mT / math.sqrt(5)
    logits = (2 * torch.tanh(logits / 2)).masked_fill(~mask, -1e300)
    logits = logits if sinks is None else torch.cat([logits, sinks.view(-1, 1, 1).expand(2, 4, 2, 1)], -1)
    weights = logits.softmax(-1)[..., :11] * mask
    return weights @ value.repeat_interleave(2, dim=1)


def test_gradients_of_reference(monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    tensors = case()

    def run(*args):
        out, lse = decode_attention(*args, PAGES, return_lse=True, **OPTIONS)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(run, tensors)
    started = OPTIONS | STARTED
    assert torch.autograd.gradcheck(lambda *args: decode_attention(*args, PAGES, **started), tensors)
    windowed = {"page_size": 3, "window": 4, "scale": 0.7}
    assert torch.autograd.gradcheck(lambda *args: decode_attention(*args, PAGES[:1, :1], **windowed), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradients_match_dense(twin, dtype, with_sinks):
    expected_inputs = case()
    sinks = [torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64).requires_grad_()] if with_sinks else []
    weight = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    (dense(*expected_inputs, *sinks) * weight).sum().backward()
    given = [x.detach().to(dtype).to(twin.device).requires_grad_() for x in (*expected_inputs, *sinks)]
    options = {name: x.to(twin.device) if isinstance(x, torch.Tensor) else x for name, x in OPTIONS.items()}
    options["sinks"] = given[3] if with_sinks else None
    out = decode_attention(*given[:3], PAGES.to(twin.device), **options)
    (out * weight.to(dtype).to(twin.device)).sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    for got, expected in zip(given, (*expected_inputs, *sinks), strict=True):
        torch.testing.assert_close(got.grad.cpu().double(), expected.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(dtype, everything, monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "auto")
    tensors = case(dtype)
    rest = (None, None, None, None, 1, 0.5, None, None)
    if not everything:
        rest = (PAGES, STARTED["lengths"], STARTED["starts"], OPTIONS["padding"], 2, 0.5, 2.0, 4)
    torch.library.opcheck(attend, (*tensors, *rest))


def test_compiles_as_one_graph(twin):
    tensors = [x.detach().float().to(twin.device) for x in case()]
    sinks = torch.zeros(4, device=twin.device)
    options = {name: x.to(twin.device) if isinstance(x, torch.Tensor) else x for name, x in OPTIONS.items()}

    def run(query, key, value, pages):
        return decode_attention(query, key, value, pages, return_lse=True, sinks=sinks, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        compiled(*tensors, PAGES.to(twin.device)), run(*tensors, PAGES.to(twin.device)), strict=True
    ):
        assert torch.equal(got, expected)
