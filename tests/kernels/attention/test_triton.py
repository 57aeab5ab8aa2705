"""The Triton twin against every pair of a query and a key in float64; through the interpreter without a GPU."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paucity.kernels.attention.problem import Problem
from paucity.ops.formats.block import BlockMask
from paucity.ops.formats.stripes import KeyLists, Window

twin = pytest.importorskip("triton") and pytest.importorskip("paucity.kernels.attention.triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape, share=None):
    return torch.randn(shape, generator=GENERATOR) if share is None else torch.rand(shape, generator=GENERATOR) < share


def left_padding(keys, *pads):
    return torch.arange(keys) >= torch.tensor(pads).unsqueeze(-1)


def pair_mask(problem, heads, batch, queries, keys):
    """Pairs seen, one by one, from the attributes of the pattern."""
    pattern, seen = problem.pattern, torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b, h, row, j in torch.cartesian_prod(*(torch.arange(n) for n in seen.shape)).tolist():
        i = row + keys - queries
        before = j if problem.padding is None else int(problem.padding[b, :j].sum())
        block = row // pattern.q_block
        if isinstance(pattern, Window):
            dropped = 0 if pattern.dropped is None else int(pattern.dropped[b])
            kept = j > i - pattern.window_size or before < pattern.num_sinks - dropped
        elif isinstance(pattern, KeyLists):
            kept = j in pattern.positions[b % len(pattern.counts), h * pattern.counts.shape[1] // heads, block].tolist()
        else:
            at = (b % len(pattern.blocks), h * pattern.blocks.shape[1] // heads, block, j // pattern.k_block)
            kept = bool(pattern.blocks[at])
            if pattern.partial is not None and pattern.partial[at] >= 0:
                inside = pattern.elements[pattern.partial[at], row % pattern.q_block, j % pattern.k_block]
                kept = kept and bool(inside)
        kept = kept and (problem.padding is None or bool(problem.padding[b, j]))
        kept = kept and (problem.window is None or j > i - problem.window)
        seen[b, h, row, j] = kept and (j <= i or not (problem.causal or isinstance(pattern, Window)))
    return seen


def dense(query, key, value, problem, bias, seen):
    shared = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(shared, 1).mT * problem.scale
    if problem.softcap is not None:
        logits = torch.tanh(logits / problem.softcap) * problem.softcap
    if bias is not None:
        logits, seen = logits + bias, seen & (bias > -math.inf)
    any_seen = seen.any(-1, keepdim=True)
    logits = logits.masked_fill(~seen, -math.inf).masked_fill(~any_seen, 0.0)
    out = logits.softmax(-1).masked_fill(~any_seen, 0.0) @ value.repeat_interleave(shared, 1)
    return out, logits.logsumexp(-1).masked_fill(~any_seen.squeeze(-1), -math.inf)


def inputs(batch, heads, group_heads, queries, keys, dim, value_dim, dtype, device=DEVICE):
    """Rows that are not contiguous: heads inside of tokens, and values on their side."""
    query, key = rand(batch, queries, heads, dim).transpose(1, 2), rand(batch, keys, group_heads, dim).transpose(1, 2)
    return [x.to(device, dtype) for x in (query, key, rand(batch, group_heads, value_dim, keys).mT)]


def check(problem, tensors, seen, tolerance):
    """Results and every gradient."""
    query, key, value = tensors
    exact = [x.double().requires_grad_() for x in tensors]
    bias = None if problem.bias is None else problem.bias.double().requires_grad_()
    expected, expected_lse = dense(*exact, problem, bias, seen)
    out, lse = twin.forward(query, key, value, problem)
    assert out.dtype == query.dtype
    torch.testing.assert_close(out.double(), expected, **tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, **tolerance)
    grad_out = rand(*(out.shape[i] for i in (0, 2, 1, 3))).to(out).transpose(1, 2)
    grad_lse = rand(*lse.shape).to(lse)
    loss = (expected * grad_out).sum() + (expected_lse.masked_fill(expected_lse.isinf(), 0.0) * grad_lse).sum()
    wanted = torch.autograd.grad(loss, exact if bias is None else [*exact, bias], allow_unused=True)
    grads = twin.backward(grad_out, grad_lse, query, key, value, out, lse, problem, bias_grad=bias is not None)
    assert [x.dtype for x in grads[:3]] == [x.dtype for x in tensors]
    assert (grads[3] is None) == (bias is None)
    for grad, want in zip(grads, wanted, strict=False):
        want = torch.zeros_like(grad, dtype=torch.float64) if want is None else want
        torch.testing.assert_close(grad.double(), want, atol=8 * tolerance["atol"], rtol=8 * tolerance["rtol"])
    return grads


def hidden_thirds(*shape):
    bias = rand(*shape)
    bias[..., ::3] = -math.inf
    return bias


def partial_blocks(batch, heads, rows, columns, q_block, k_block, queries, keys):
    shape = (batch, heads, rows, columns)
    partial = torch.where(rand(*shape, share=0.6), torch.randint(0, 5, shape, generator=GENERATOR), -1).int()
    elements = rand(5, q_block, k_block, share=0.5)
    return BlockMask(rand(*shape, share=0.6), q_block, k_block, queries, keys, partial, elements)


F32 = {"atol": 2e-6, "rtol": 2e-6}
CASES = {  # problem; batch, heads, key-value heads, queries, keys, D, Dv; dtype; tolerance
    "partial blocks": (
        Problem(partial_blocks(2, 4, 3, 5, 7, 5, 17, 23), 0.4, 2.0, left_padding(23, 0, 9), window=11),
        *((2, 4, 2, 17, 23, 8, 20), torch.float32, F32),
    ),
    "not causal, with a bias": (
        Problem(partial_blocks(1, 2, 1, 2, 48, 17, 20, 33), 0.1, 3.0, causal=False, bias=hidden_thirds(1, 4, 1, 33)),
        *((1, 4, 2, 20, 33, 64, 8), torch.float32, F32),
    ),
    "blocks that all share": (
        Problem(BlockMask.causal(70, q_block=64, k_block=32), 0.2),
        *((1, 2, 1, 70, 70, 20, 20), torch.bfloat16, {"atol": 2e-2, "rtol": 2e-2}),
    ),
    "lists of heads": (
        Problem(KeyLists.from_mask(rand(1, 4, 2, 19, share=0.3), q_block=16), 0.4, window=9, causal=False),
        *((2, 4, 2, 17, 19, 8, 8), torch.float32, F32),
    ),
    "lists that all share": (
        Problem(
            KeyLists.from_mask(rand(2, 1, 1, 19, share=0.5), q_block=32),
            *(0.4, None, left_padding(19, 3, 12)),
            bias=hidden_thirds(2, 1, 17, 19),
        ),
        *((2, 2, 1, 17, 19, 8, 8), torch.float32, F32),
    ),
    "empty lists": (
        Problem(KeyLists.from_mask(torch.zeros(1, 1, 2, 5, dtype=torch.bool), q_block=3), 1.0),
        *((1, 1, 1, 5, 5, 8, 8), torch.float32, F32),
    ),
    "window": (
        Problem(Window(9, 4, 16), 0.4, None, left_padding(40, 3, 27), window=21, bias=hidden_thirds(2, 1, 1, 40)),
        *((2, 2, 1, 33, 40, 8, 8), torch.float32, F32),
    ),
    "window of a cropped cache": (
        Problem(Window(5, 3, 4, torch.tensor([1, 7])), 0.4),
        *((2, 2, 2, 6, 20, 8, 8), torch.float16, {"atol": 2e-3, "rtol": 2e-3}),
    ),
    "one query": (Problem(Window(7, 2), 0.4), (1, 4, 2, 1, 33, 8, 8), torch.float32, F32),
    "the model's window is the smaller": (
        Problem(Window(9, 4), 0.4, window=5),
        (1, 1, 1, 33, 33, 8, 8),
        torch.float32,
        F32,
    ),
}


def on(device, problem):
    move = {name: getattr(problem, name) for name in ("padding", "bias")}
    return replace(problem, **{name: x if x is None else x.to(device) for name, x in move.items()})


@pytest.mark.parametrize(("problem", "sizes", "dtype", "tolerance"), CASES.values(), ids=CASES)
def test_matches_pairs_and_their_gradients(problem, sizes, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(twin, "_BUFFER", 1 << 12)  # so that lists go through in parts
    batch, heads, _, queries, keys = sizes[:5]
    seen = pair_mask(problem, heads, batch, queries, keys)
    assert seen.any() == (not isinstance(problem.pattern, KeyLists) or bool(problem.pattern.counts.any()))
    check(on(DEVICE, problem), inputs(*sizes, dtype), seen.to(DEVICE), tolerance)


@pytest.mark.parametrize("name", ["partial blocks", "not causal, with a bias", "lists that all share", "window"])
def test_what_nobody_sees_may_be_nan(name):
    problem, sizes, dtype, _ = CASES[name]
    batch, heads, group_heads, queries, keys = sizes[:5]
    seen = pair_mask(problem, heads, batch, queries, keys)
    seen = seen if problem.bias is None else seen & (problem.bias > -math.inf)
    problem, (query, key, value) = on(DEVICE, problem), inputs(*sizes, dtype)
    grad = torch.ones(*query.shape[:3], value.shape[3], device=DEVICE)
    unseen = ~seen.view(batch, group_heads, -1, keys).any(2).to(DEVICE)
    blind = ~seen.any(-1).to(DEVICE)
    assert unseen.any()
    results = []
    for _ in range(2):
        out, lse = twin.forward(query, key, value, problem)
        grads = twin.backward(grad, None, query, key, value, out, lse, problem, bias_grad=False)
        results.append((out, lse, *grads[:3]))
        query, key, value = query.clone(), key.clone(), value.clone()
        query[blind], key[unseen], value[unseen] = math.nan, math.nan, math.nan
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def test_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter takes what the compiler does not; the compiler needs no GPU."""
    source = Path(twin.__file__).parents[3]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(source)}
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["forward_kernel", "query_kernel", "key_kernel", "key_kernel"] + ["sum_kernel"] * 2


def compile_all():
    """Compile what one problem with everything in it launches, for an H100, and print the names."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from paucity.kernels.attention import triton_plan

    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}

    def type_of(value):
        if isinstance(value, tuple):
            return tuple(type_of(x) for x in value)
        if isinstance(value, torch.Tensor):
            return types.get(value.dtype, "*u8")
        return {int: "i32", float: "fp32"}.get(type(value), "constexpr")

    def run(kernel, *args, grid, warmup, num_warps=4, num_stages=3, enable_fp_fusion=True, **constants):
        names = dict(zip(kernel.arg_names, args, strict=False))
        constants |= {name: value for name, value in names.items() if value is None}
        signature = {name: type_of(names.get(name)) for name in kernel.arg_names}
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
        source = ASTSource(kernel, signature, constants)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(kernel.__name__)

    triton.JITFunction.run = run
    triton_plan._HALF = dict.fromkeys(triton_plan.Pass, ((32, 16, 16, 4, 2),))  # small tiles compile fast
    problem = Problem(Window(40, 2), 0.1, 2.0, left_padding(100, 3), bias=rand(1, 1, 1, 100))
    tensors = inputs(1, 4, 2, 90, 100, 32, 32, torch.bfloat16, "cpu")
    out, lse = twin.forward(*tensors, problem)
    twin.backward(torch.empty_like(out), None, *tensors, out, lse, problem, bias_grad=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["window", "blocks", "lists"])
def test_large_on_a_gpu(kind, dtype):
    keys, padding = 1500, left_padding(1500, 0, 37).cuda()
    if kind == "window":
        pattern = Window(300, 5)
        mask = pattern.visible(1400, keys, padding=padding)
    elif kind == "blocks":
        pattern = BlockMask(rand(2, 8, 11, 12, share=0.4).cuda(), 128, 128, 1400, keys)
        mask = pattern.to_dense(causal=True) & padding[:, None, None]
    else:
        pattern = KeyLists.from_mask(rand(2, 2, 22, keys, share=0.2).cuda(), q_block=64)
        mask = pattern.visible(1400, keys, padding=padding)
    seen = mask.repeat_interleave(8 // mask.shape[1], dim=1).cuda()
    tensors = inputs(2, 8, 2, 1400, keys, 128, 128, dtype)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    problem = Problem(pattern, 0.09, padding=padding)
    check(problem, tensors, seen, tolerance)
    out, lse = twin.forward(*tensors, problem)
    first, again = (twin.backward(out, lse, *tensors, out, lse, problem, bias_grad=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))


if __name__ == "__main__":
    compile_all()
