"""The native twin against the formula in float64, with every unseen key and value NaN."""

import dataclasses
import math

import pytest
import torch

from paucity.checks import InputError
from paucity.kernels import native as library
from paucity.kernels.attention import native
from paucity.kernels.attention.problem import Problem
from paucity.ops.formats.block import BlockMask
from paucity.ops.formats.stripes import KeyLists, Window

pytestmark = pytest.mark.usefixtures("native_twin")

SETS = ("plain", "avx2", "avx512", "avx512bf16")
SHAPES = [  # batch, heads, key-value heads, queries, keys, dim, dim of the values
    (2, 4, 2, 63, 63, 8, 8),
    (1, 4, 1, 200, 333, 17, 33),
    (2, 2, 2, 1, 97, 64, 40),
]
FORWARD = {torch.float32: 3e-6, torch.bfloat16: 2e-2}  # of values about 1
BACKWARD = {torch.float32: 3e-6, torch.bfloat16: 1e-2}  # of the largest gradient plus 1


@pytest.fixture(params=SETS)
def isa(request, monkeypatch):
    if request.param not in library.instruction_sets():
        pytest.skip(f"no native library for {request.param} here")
    monkeypatch.setenv("PAUCITY_ISA", request.param)


def window(shape, generator):
    return Problem(Window(shape[4] // 4, 5), 0.3)


def lists(shape, generator):
    batch, heads, _, queries, keys = shape[:5]
    mask = torch.rand(batch, heads, -(-queries // 24), keys, generator=generator) < 0.3
    mask[0, 0, 0] = False  # nothing at all
    padding = torch.arange(keys) >= torch.tensor([[keys // 3]])
    return Problem(KeyLists.from_mask(mask, q_block=24), 0.3, padding=padding.expand(batch, -1), softcap=2.0)


def blocks(shape, generator):
    _, _, kv_heads, queries, keys = shape[:5]
    kept = torch.rand(1, kv_heads, -(-queries // 150), -(-keys // 70), generator=generator) < 0.7
    elements = torch.rand(5, 150, 70, generator=generator) < 0.5
    elements[:, :, ::3] = False
    partial = torch.where(kept, torch.randint(-1, 5, kept.shape, generator=generator), -1).int()
    bias = torch.randn(1, shape[1], 1, keys, generator=generator)
    bias[..., ::7] = -math.inf
    pattern = BlockMask(kept, 150, 70, queries, keys, partial, elements)
    return Problem(pattern, 0.3, causal=False, window=keys // 2, bias=bias)


def seen_by(problem, shape):
    """Bool ``[B, H, Tq, Tk]``: the pattern, then all that hides a key."""
    batch, heads, _, queries, keys = shape[:5]
    pattern = problem.pattern
    at, key = torch.arange(keys - queries, keys).unsqueeze(-1), torch.arange(keys)
    if isinstance(pattern, BlockMask):
        seen = pattern.blocks.repeat_interleave(pattern.q_block, 2).repeat_interleave(pattern.k_block, 3)
        for b, h, q, k in (pattern.partial >= 0).nonzero().tolist():
            rows = slice(q * pattern.q_block, (q + 1) * pattern.q_block)
            columns = slice(k * pattern.k_block, (k + 1) * pattern.k_block)
            seen[b, h, rows, columns] &= pattern.elements[pattern.partial[b, h, q, k]]
        seen = seen[:, :, :queries, :keys]
    else:
        seen = pattern.visible(queries, keys, padding=problem.padding, window=problem.window)
    seen = seen.repeat_interleave(heads // seen.shape[1], 1).expand(batch, heads, -1, -1)
    if problem.causal:
        seen = seen & (key <= at)
    if problem.window is not None:
        seen = seen & (key > at - problem.window)
    return seen if problem.bias is None else seen & (problem.bias != -math.inf)


def formula(query, key, value, bias, seen, problem):
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).mT * problem.scale
    if problem.softcap is not None:
        logits = torch.tanh(logits / problem.softcap) * problem.softcap
    logits = (logits if bias is None else logits + bias).masked_fill(~seen, -math.inf)
    lse = logits.logsumexp(-1)
    prob = (logits - torch.where(lse.isinf(), 0.0, lse).unsqueeze(-1)).exp()
    return prob @ value.repeat_interleave(group, 1), lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [window, lists, blocks])
def test_matches_the_formula(isa, threads, make, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    problem = make(shape, generator)
    batch, heads, kv_heads, queries, keys, dim, value_dim = shape
    sizes = ((queries, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim))
    # Not contiguous, as the projections of a model leave them.
    given = [torch.randn(batch, *size, generator=generator).to(dtype).transpose(1, 2) for size in sizes]
    exact = [x.double().requires_grad_() for x in given]
    bias = None if problem.bias is None else problem.bias.double().requires_grad_()
    seen = seen_by(problem, shape)
    expected, expected_lse = formula(*exact, bias, seen, problem)
    unseen = ~seen.view(batch, kv_heads, -1, keys).any(2)
    for tensor in given[1:]:
        tensor[unseen] = math.nan

    out, lse = native.forward(*given, problem)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=FORWARD[dtype], rtol=FORWARD[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-6)

    some = ~expected_lse.isinf()
    grad_out, grad_lse = torch.randn(out.shape, generator=generator).to(dtype), torch.randn(lse.shape)
    loss = (expected * grad_out.double()).sum() + (expected_lse * grad_lse)[some].sum()
    wanted = torch.autograd.grad(loss, [*exact, *([] if bias is None else [bias])])
    grad_out[~some], grad_lse[~some] = math.nan, math.nan  # nothing comes back from rows that saw nothing
    grads = native.backward(grad_out, grad_lse, *given, out, lse, problem, bias_grad=bias is not None)
    assert (grads[3] is None) == (bias is None)
    for grad, right in zip(grads, wanted, strict=False):
        atol = BACKWARD[dtype] * (1 + right.abs().max().item())
        torch.testing.assert_close(grad.double(), right, atol=atol, rtol=0)


@pytest.mark.parametrize("make", [window, lists, blocks])
def test_threads_do_not_change_a_bit(make):
    shape = (1, 4, 2, 300, 300, 16, 16)
    generator, before, runs = torch.Generator().manual_seed(0), torch.get_num_threads(), []
    problem = make(shape, generator)
    given = [torch.randn(1, heads, 300, 16, generator=generator) for heads in (4, 2, 2)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out, lse = native.forward(*given, problem)
        has_bias = problem.bias is not None
        runs.append(
            [out, lse, *native.backward(out, lse.nan_to_num(neginf=0), *given, out, lse, problem, bias_grad=has_bias)]
        )
    torch.set_num_threads(before)
    for one, two in zip(*runs, strict=True):
        assert one is two is None or torch.equal(one, two)


@pytest.mark.parametrize("shape", [(2, 4, 20, 30), (1, 1, 20, 30), (2, 1, 1, 30), (1, 4, 1, 30)])
def test_gradient_of_a_shared_bias_is_the_sum(shape):
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((4, 20), (2, 30), (2, 30))]
    bias = torch.randn(shape, generator=generator)
    problem = Problem(Window(12, 2), 0.3, bias=bias)
    full = dataclasses.replace(problem, bias=bias.expand(2, 4, 20, 30))
    out, lse = native.forward(*given, problem)
    grad = torch.randn(out.shape, generator=generator)
    shared, every = (native.backward(grad, None, *given, out, lse, x, bias_grad=True)[3] for x in (problem, full))
    torch.testing.assert_close(shared, every.sum_to_size(shape), atol=1e-5, rtol=1e-5)


def test_a_position_beyond_the_keys_is_refused():
    query = torch.randn(1, 1, 4, 8)
    lists = KeyLists(torch.tensor([[[[0, 4]]]], dtype=torch.int32), torch.tensor([[[2]]]), 4)
    with pytest.raises(InputError, match="positions must be below 4"):
        native.forward(query, query, query, Problem(lists, 1.0))
