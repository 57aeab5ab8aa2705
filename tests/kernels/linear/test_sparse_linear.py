"""Linears over some inputs or for some outputs against loops in float64, for every twin."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from paucity.activations import teal_mask, wina_mask
from paucity.checks import InputError, InputTypeError
from paucity.kernels import dispatch, native
from paucity.kernels.linear import input_major, masked_input_linear, op, sparse_input_linear, sparse_output_linear
from paucity.measure.flops import flops
from paucity.ops.select import topk_mask

TOLERANCE = {torch.float32: {"atol": 1e-4, "rtol": 1e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 1e-2}}
SHAPES = [(1, 1, 1), (1, 63, 1000), (1, 1000, 63), (2, 64, 130), (3, 40, 17), (16, 33, 70)]  # tokens, in, out


@pytest.fixture
def compiled_kernels(monkeypatch):
    """Force the native twin where it was built: small weights would run dense otherwise."""
    monkeypatch.setenv("PAUCITY_KERNELS", "native" if native.library() else "reference")


def problem(twin, tokens, size, out, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    parts = (torch.randn(shape, generator=gen).to(dtype) for shape in ((tokens, size), (out, size), (out,)))
    return [part.to(twin.device) for part in parts]


def naive_mask(x, norm=None, threshold=None, k=None):
    """By loops: the k highest by sorting, the earlier of equal ones first, NaN last."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for token, row in enumerate(x.float().cpu()):
        scores = (row.abs() if norm is None else row.abs() * norm.float().cpu()).tolist()
        order = sorted(range(len(scores)), key=lambda j: (scores[j] != scores[j], -scores[j], j))
        kept = order[:k] if threshold is None else [j for j in order if scores[j] > threshold]
        mask[token, kept] = True
    return mask


def naive_input(x, weight, mask, bias=None):
    """Each token by itself, over its own inputs, in float64."""
    out = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for token, kept in enumerate(mask.cpu()):
        out[token] = weight.cpu().double()[:, kept] @ x[token].cpu().double()[kept]
    return out if bias is None else out + bias.cpu().double()


def close(actual, expected):
    torch.testing.assert_close(actual.cpu().double(), expected, **TOLERANCE[actual.dtype])


@pytest.mark.parametrize(("tokens", "size", "out"), SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normed", [False, True])
def test_sparse_input_matches_naive(twin, tokens, size, out, dtype, normed):
    x, weight, bias = problem(twin, tokens, size, out, dtype)
    norm = torch.rand(size, device=twin.device) if normed else None
    for chosen in ({"threshold": 0.5}, {"k": size // 2}):
        mask = naive_mask(x, norm, **chosen)
        with dispatch.dense_runs() as dense:
            close(
                sparse_input_linear(x, input_major(weight), bias, norm=norm, **chosen),
                naive_input(x, weight, mask, bias),
            )
            close(masked_input_linear(x, input_major(weight), mask.to(x.device)), naive_input(x, weight, mask))
        assert not dense


@pytest.mark.parametrize(("tokens", "size", "out"), SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sparse_output_matches_naive(twin, tokens, size, out, dtype):
    x, weight, bias = problem(twin, tokens, size, out, dtype)
    rows = (torch.rand(tokens, out, generator=torch.Generator().manual_seed(1)) < 0.4).to(x.device)
    expected = naive_input(x, weight, torch.ones(tokens, size, dtype=torch.bool), bias) * rows.cpu()
    with dispatch.dense_runs() as dense:
        close(sparse_output_linear(x, weight, rows, bias), expected)
    assert not dense
    shared = sparse_output_linear(x[:, None], weight, rows[0], bias)
    assert shared.shape == (tokens, 1, out)
    close(shared[0], expected[:1])
    assert not shared[..., ~rows[0]].any()


def test_what_no_token_keeps_is_not_read(twin):
    x, weight, bias = problem(twin, 2, 70, 40)
    mask = torch.zeros(2, 70, dtype=torch.bool, device=x.device)
    mask[:, 10:30], mask[0, 60] = True, True
    expected = naive_input(x, weight, mask, bias)
    weight[:, ~mask.any(0)] = float("nan")
    x[~mask] = float("nan")
    close(masked_input_linear(x, input_major(weight), mask, bias), expected)
    close(sparse_input_linear(x, input_major(weight), bias, threshold=0.0)[:1], expected[:1])
    close(sparse_input_linear(x[:1], input_major(weight), bias, k=21), expected[:1])
    nothing = torch.zeros_like(mask)
    assert torch.equal(masked_input_linear(x, input_major(weight), nothing, bias), bias.expand(2, -1))
    assert torch.equal(sparse_input_linear(x, input_major(weight), k=0), torch.zeros(2, 40, device=x.device))
    x, weight, bias = problem(twin, 2, 70, 40)
    rows = torch.zeros(2, 40, dtype=torch.bool, device=x.device)
    rows[1, 5:20] = True
    expected = F.linear(x, weight, bias).double() * rows
    weight[~rows.any(0)], bias[~rows.any(0)] = float("nan"), float("nan")
    close(sparse_output_linear(x, weight, rows, bias), expected.cpu())
    assert not sparse_output_linear(x, weight, torch.zeros_like(rows), bias).any()


def test_selection_has_the_order_of_the_operators(twin):
    nan, inf = float("nan"), float("inf")
    row = torch.tensor([[1.0, -1.0, nan, 0.0, -0.0, inf, 1.0, -inf, 1e-40, 1.0]], device=twin.device)
    eye = input_major(torch.eye(10, device=twin.device))
    for x in (row, row.bfloat16(), row[:, 3:5]):
        for k in range(x.shape[1] + 1):
            _, mask = op.sparse_input(x, eye[: x.shape[1], : x.shape[1]].to(x.dtype), None, None, None, k)
            assert torch.equal(mask.cpu(), naive_mask(x, k=k))
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(3)).to(twin.device)
    norm = torch.rand(10, generator=torch.Generator().manual_seed(4)).to(twin.device)
    for dtype in (torch.float32, torch.bfloat16):
        _, mask = op.sparse_input(x.to(dtype), eye.to(dtype), None, None, 0.3, None)
        assert torch.equal(mask, teal_mask(x.to(dtype), 0.3))
        _, mask = op.sparse_input(x.to(dtype), eye.to(dtype), None, norm, None, 4)
        assert torch.equal(mask, wina_mask(x.to(dtype), norm, sparsity=0.6))
        tie = x.to(dtype)[0, 0].abs().item()  # equal to the threshold is not above it
        _, mask = op.sparse_input(x.to(dtype), eye.to(dtype), None, None, tie, None)
        assert torch.equal(mask, x.to(dtype).abs() > tie)


def test_strided_inputs(twin):
    x = torch.randn(2, 3, 96, device=twin.device)[..., ::2]
    wide = input_major(torch.randn(50, 48, device=twin.device))[10:40]  # a part of the outputs: stride(1) is 50
    mask = (torch.rand(48, 6, device=twin.device) < 0.5).t().view(2, 3, 48)
    expected = naive_input(x.reshape(6, 48), wide, mask.reshape(6, 48))
    with dispatch.dense_runs() as dense:
        close(masked_input_linear(x, wide, mask).view(6, 30), expected)
        part = torch.randn(30, 60, device=twin.device)[:, 5:53]
        close(
            sparse_output_linear(x, part, torch.ones(30, dtype=torch.bool, device=x.device)).view(6, 30),
            x.reshape(6, 48).cpu().double() @ part.cpu().double().t(),
        )
    assert not dense
    assert masked_input_linear(x[:0], wide, mask[:0]).shape == (0, 3, 30)


@pytest.mark.usefixtures("native_twin")
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_threads_do_not_change_a_bit(tokens, dtype, compiled_kernels):
    x, weight, bias = (t.to(dtype) for t in (torch.randn(tokens, 300), torch.randn(1000, 300), torch.randn(1000)))
    rows, results, before = torch.rand(tokens, 1000) < 0.5, [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        inputs = sparse_input_linear(x, input_major(weight), bias, k=150)
        results.append(torch.cat((inputs, sparse_output_linear(x, weight, rows, bias))))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_dense_where_sparse_would_lose(monkeypatch):
    monkeypatch.delenv("PAUCITY_KERNELS", raising=False)
    monkeypatch.setattr(op, "MIN_WEIGHTS", 0)
    if dispatch.twin("sparse linear", torch.ones(1)) == "reference":
        pytest.skip("needs a kernel that could lose")
    x, weight, rows = torch.randn(17, 64), torch.randn(48, 64), torch.ones(48, dtype=torch.bool)
    one, stored = x[:1], input_major(weight)
    expected = F.linear(x, weight)

    def ran_dense(call, tokens):
        with dispatch.dense_runs() as reasons:
            torch.testing.assert_close(call(), expected[:tokens], atol=1e-4, rtol=1e-4)
        (reason,) = reasons
        return reason

    assert "not stored input-major" in ran_dense(lambda: sparse_input_linear(one, weight, k=64), 1)
    assert "more than 16 tokens" in ran_dense(lambda: sparse_input_linear(x, stored, k=64), 17)
    assert "not stored output-major" in ran_dense(lambda: sparse_output_linear(one, stored, rows), 1)
    assert "more than 16 tokens" in ran_dense(lambda: masked_input_linear(x, stored, x == x), 17)
    for call in (
        lambda: sparse_input_linear(one, stored, k=64),
        lambda: masked_input_linear(one, stored, one == one),
        lambda: sparse_output_linear(one, weight, rows),
    ):
        assert "more than 85% kept" in ran_dense(call, 1)
    many, halves = x[:9].bfloat16(), stored.bfloat16()
    with dispatch.dense_runs() as reasons:
        masked_input_linear(many, halves, torch.arange(64) < 40)
        masked_input_linear(x[:9], stored, torch.arange(64) < 40)
        masked_input_linear(many[:8], halves, torch.arange(64) < 40)
    assert dict(reasons) == {"sparse linear ran dense: more than 60% kept": 1}
    assert flops(lambda: sparse_input_linear(one, stored, k=64)) == 2 * 64 * 48
    assert flops(lambda: sparse_input_linear(one, stored, k=32)) == 2 * 32 * 48
    assert flops(lambda: sparse_output_linear(one, weight, rows & (torch.arange(48) < 10))) == 2 * 64 * 10
    monkeypatch.setattr(op, "MIN_WEIGHTS", 2**20)
    assert "weight is small" in ran_dense(lambda: sparse_input_linear(one, stored, k=64), 1)


def test_a_forced_twin_runs_its_kernel(twin):
    tokens = 5 if twin.name == "triton" else 37
    x, weight, bias = problem(twin, tokens, 40, 33)
    rows = (torch.rand(tokens, 33, generator=torch.Generator().manual_seed(1)) < 0.9).to(x.device)
    stored = input_major(weight)
    everything = torch.ones(tokens, 40, dtype=torch.bool, device=x.device)
    with dispatch.dense_runs() as reasons:
        close(masked_input_linear(x, stored, everything, bias), naive_input(x, weight, everything, bias))
        mask = naive_mask(x, k=30)
        close(sparse_input_linear(x, stored, bias, k=30), naive_input(x, weight, mask, bias))
        close(sparse_output_linear(x, weight, rows, bias), naive_input(x, weight, everything, bias) * rows.cpu())
    assert not reasons
    if twin.name == "native":
        counted = sum(len(part) * int(part.any(0).sum()) for part in mask.split(16))
        assert flops(lambda: sparse_input_linear(x, stored, bias, k=30)) == 2 * 33 * counted
        with dispatch.dense_runs() as reasons:
            sparse_input_linear(x, weight, k=30)
        assert dict(reasons) == {"sparse linear ran dense: the weight is not stored input-major": 1}


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    x, weight, bias = leaves((3, 6), (5, 6), (5,))
    mask, rows = torch.rand(3, 6) < 0.5, torch.rand(3, 5) < 0.5
    norm = torch.rand(6)
    assert torch.autograd.gradcheck(lambda *a: sparse_input_linear(*a, k=3), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *a: sparse_input_linear(*a, threshold=0.4, norm=norm), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w, b: masked_input_linear(x, w, mask, b), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w, b: sparse_output_linear(x, w, rows, b), (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda x, w, b: sparse_output_linear(x, w, rows, b), (x, weight, bias))


def test_gradients_are_those_of_the_masked_product(twin):
    x, weight, bias = (t.requires_grad_() for t in problem(twin, 3, 30, 20))
    mask, rows = naive_mask(x.detach(), k=15).to(x.device), torch.rand(3, 20, device=x.device) < 0.5
    ours = (sparse_input_linear(x, input_major(weight), bias, k=15), sparse_output_linear(x, weight, rows, bias))
    dense = (F.linear(x * mask, weight, bias), F.linear(x, weight, bias) * rows)
    for out, expected in zip(ours, dense, strict=True):
        direction = torch.randn_like(out)
        for got, wanted in zip(
            torch.autograd.grad(out, (x, weight, bias), direction),
            torch.autograd.grad(expected, (x, weight, bias), direction),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)


def test_operators_are_well_formed(compiled_kernels):
    x, weight, bias = leaves((2, 12), (9, 12), (9,), dtype=torch.float32)
    stored = input_major(weight.detach()).requires_grad_()
    mask, rows = torch.rand(2, 12) < 0.5, torch.rand(2, 9) < 0.5
    opcheck(op.sparse_input, (x, stored, bias, None, None, 5))
    opcheck(op.sparse_input, (x, stored, None, torch.rand(12), 0.3, None))
    opcheck(op.masked_input, (x, stored, mask, bias))
    opcheck(op.sparse_output, (x, weight, rows, bias))


def test_compiles(twin):
    x, weight, bias = problem(twin, 2, 12, 9)
    stored, rows = input_major(weight), torch.rand(9, device=x.device) < 0.5

    def both(x):
        return sparse_input_linear(x, stored, bias, k=5) + sparse_output_linear(x, weight, rows, bias)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), both(x))


def test_bad_input():
    x, weight = torch.ones(2, 6), input_major(torch.ones(4, 6))
    for chosen in ({}, {"k": 2, "threshold": 0.1}):
        with pytest.raises(InputError, match="exactly one of threshold and k must be given"):
            sparse_input_linear(x, weight, **chosen)
    with pytest.raises(InputError, match=r"k must be in \[0, 6\], got 7"):
        sparse_input_linear(x, weight, k=7)
    with pytest.raises(InputError, match=r"norm must have shape \[6\], got \[4\]"):
        sparse_input_linear(x, weight, k=2, norm=torch.ones(4))
    with pytest.raises(InputError, match=r"x must have shape \[\.\.\., 6\], got \[2, 5\]"):
        sparse_input_linear(torch.ones(2, 5), weight, k=2)
    with pytest.raises(InputTypeError, match="x must have the dtype of weight"):
        sparse_input_linear(x.bfloat16(), weight, k=2)
    with pytest.raises(InputTypeError, match="bias must have the dtype of x"):
        sparse_input_linear(x, weight, torch.ones(4).double(), k=2)
    with pytest.raises(InputError, match=r"bias must have shape \[4\], got \[6\]"):
        masked_input_linear(x, weight, x > 0, torch.ones(6))
    with pytest.raises(InputTypeError, match="mask must be bool"):
        masked_input_linear(x, weight, x)
    with pytest.raises(InputError, match=r"mask must have shape \[2, 6\] or \[6\], got \[2, 4\]"):
        masked_input_linear(x, weight, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(InputError, match=r"rows must have shape \[2, 4\] or \[4\], got \[6\]"):
        sparse_output_linear(x, weight, torch.ones(6, dtype=torch.bool))
    with pytest.raises(InputError, match="weight must have 2 dimensions"):
        input_major(torch.ones(3))


def test_without_a_kernel_it_runs_dense_and_says_so(monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "auto")
    x, weight = torch.randn(2, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    with dispatch.dense_runs() as counted:
        out = sparse_input_linear(x, input_major(weight), k=3)
    kept = x.where(topk_mask(x, k=3, by_abs=True), 0)
    torch.testing.assert_close(out, kept @ weight.T)
    assert dict(counted) == {"sparse linear ran dense: no kernel takes float64 here": 1}
