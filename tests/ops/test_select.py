import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paucity.checks import InputError, InputTypeError
from paucity.ops import select
from paucity.ops.indices import indices_to_mask, mask_to_indices
from paucity.ops.select import (
    batch_topk_mask,
    block_topk_mask,
    global_topk_mask,
    global_topk_masks,
    nm_mask,
    num_kept,
    statistical_threshold,
    statistical_topk_mask,
    threshold_mask,
    top_p_mask,
    topk_indices,
    topk_mask,
)

NAN, INF = math.nan, math.inf
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int64,
]
few = settings(max_examples=60, derandomize=True, deadline=None)
value = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -3.0, INF, -INF, NAN])


def naive_order(row, by_abs=False):
    """Positions, best first: by value, then position; NaN last."""
    row = [abs(v) for v in row] if by_abs else row
    return sorted(range(len(row)), key=lambda i: (row[i] != row[i], 0 if row[i] != row[i] else -row[i], i))


def naive_mask(row, k, by_abs=False):
    return [i in naive_order(row, by_abs)[:k] for i in range(len(row))]


def mixed(dtype, *shape):
    """Few distinct values, so that ties are the rule; negative where the dtype has them."""
    low = 0 if dtype == torch.uint8 else -4
    return torch.randint(low, 5, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@few
@given(st.lists(value, min_size=1, max_size=9), st.data())
def test_topk_matches_naive(row, data):
    k, by_abs = data.draw(st.integers(0, len(row))), data.draw(st.booleans())
    score = torch.tensor(row)
    assert topk_indices(score, k, by_abs=by_abs).tolist() == naive_order(row, by_abs)[:k]
    assert topk_mask(score, k=k, by_abs=by_abs).tolist() == naive_mask(row, k, by_abs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_every_dtype_and_dim(dtype, dim):
    score = mixed(dtype, 3, 5, 4)
    expect = torch.tensor([naive_mask(r, 2) for r in score.movedim(dim, -1).reshape(-1, score.shape[dim]).tolist()])
    expect = expect.view(score.movedim(dim, -1).shape).movedim(-1, dim)
    mask, indices = topk_mask(score, k=2, dim=dim), topk_indices(score, 2, dim=dim)
    assert torch.equal(mask, expect)
    assert mask.is_contiguous()
    assert topk_mask(score.mT, k=2, dim=dim).is_contiguous()
    assert torch.equal(torch.zeros_like(mask).scatter(dim, indices, True), expect)


@few
@given(st.integers(0, 10**6), st.floats(0, 1, exclude_max=True))
def test_num_kept_is_the_rounded_rest(size, sparsity):
    kept = num_kept(size, sparsity)
    assert 0 <= kept <= size
    assert abs(size - kept - size * sparsity) <= 0.5


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_topk_properties(sparsity):
    score = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    mask = topk_mask(score, sparsity=sparsity)
    assert (mask.sum(-1) == num_kept(40, sparsity)).all()
    assert torch.equal(mask, topk_mask(3 * score - 1, sparsity=sparsity))
    assert torch.equal(mask, topk_mask(score.clone().requires_grad_(), sparsity=sparsity))
    perm = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(mask[:, perm], topk_mask(score[:, perm], sparsity=sparsity))


def test_int8_lowest_has_an_absolute_value():
    assert topk_mask(torch.tensor([127, -128], dtype=torch.int8), k=1, by_abs=True).tolist() == [False, True]
    assert threshold_mask(torch.tensor([-128], dtype=torch.int8), 127, by_abs=True).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_global_and_batch_compete_over_everything(dtype):
    score = mixed(dtype, 4, 6)
    expect = torch.tensor(naive_mask(score.flatten().tolist(), 8)).view(4, 6)
    assert torch.equal(global_topk_mask(score, k=8), expect)
    assert torch.equal(batch_topk_mask(score, k=2), expect)
    assert torch.equal(batch_topk_mask(score, k=2, dim=0), global_topk_mask(score, k=12))
    parts = global_topk_masks({"a": score[:1], "b": score[1:]}, k=8)
    assert torch.equal(torch.cat([parts["a"], parts["b"]]), expect)


def test_threshold_is_strict_and_drops_nan():
    score = torch.tensor([[-2.0, 1.0, NAN], [0.5, -0.5, 3.0]])
    assert threshold_mask(score, 0.5).tolist() == [[False, True, False], [False, False, True]]
    assert threshold_mask(score, 0.5, by_abs=True).tolist() == [[True, True, False], [False, False, True]]
    assert threshold_mask(score, torch.tensor([[0.0], [2.0]])).tolist() == [[False, True, False], [False, False, True]]


@few
@given(st.lists(st.integers(0, 16), min_size=1, max_size=8), st.integers(1, 32))
def test_top_p_is_the_shortest_prefix(sixteenths, share):
    row, p = [v / 16 for v in sixteenths], share / 32
    order, size = naive_order(row), len(row)
    count = next((n for n in range(1, size + 1) if sum(row[i] for i in order[:n]) >= p), size)
    assert top_p_mask(torch.tensor(row), p=p).tolist() == [i in order[:count] for i in range(size)]


def test_top_p_ignores_nan_and_negative():
    prob = torch.tensor([[NAN, 0.5, -1.0, 0.25, 0.25]]).T
    assert top_p_mask(prob, p=1.0, dim=0).T.tolist() == [[False, True, False, True, True]]


@pytest.mark.parametrize(("n", "m", "dim"), [(2, 4, -1), (1, 4, 0), (3, 8, 1), (4, 4, 0), (1, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nm_matches_naive(n, m, dim, dtype):
    score = mixed(dtype, 8, 16)
    rows = (score if dim else score.T).tolist()
    expect = torch.tensor([[kept for j in range(0, len(r), m) for kept in naive_mask(r[j : j + m], n)] for r in rows])
    assert torch.equal(nm_mask(score, n=n, m=m, dim=dim), expect if dim else expect.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
@pytest.mark.parametrize("block", [(2, 3), (4, 1), (6,), (1, 2, 2)])
def test_block_matches_naive(block, dtype):
    score = mixed(dtype, 2, 4, 6)
    lead, tiled = score.shape[: -len(block)], score.shape[-len(block) :]
    expect = torch.zeros(score.shape, dtype=torch.bool)
    for index in itertools.product(*map(range, lead)):
        starts = list(itertools.product(*(range(0, t, b) for t, b in zip(tiled, block, strict=True))))
        slices = [(*index, *(slice(s, s + b) for s, b in zip(start, block, strict=True))) for start in starts]
        for kept in naive_order([score[s].sum().item() for s in slices])[: num_kept(len(slices), 0.5)]:
            expect[slices[kept]] = True
    assert torch.equal(block_topk_mask(score, block=block, sparsity=0.5), expect)


@pytest.mark.parametrize("dim", [0, 1])
def test_statistical_threshold_is_the_normal_quantile(dim):
    x = torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    rows = x.movedim(dim, -1).tolist()
    expect = [statistics.fmean(r) + statistics.pstdev(r) * statistics.NormalDist().inv_cdf(0.9) for r in rows]
    threshold = statistical_threshold(x, sparsity=0.9, dim=dim)
    assert torch.allclose(threshold.squeeze(dim), torch.tensor(expect, dtype=torch.float64))
    assert torch.equal(statistical_topk_mask(x, sparsity=0.9, dim=dim), x > threshold)
    assert statistical_topk_mask(x, sparsity=0.0).all()


def test_statistical_threshold_differentiates():
    x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: statistical_threshold(x, sparsity=0.8), x)
    constant = torch.ones(1, 4, requires_grad=True)
    statistical_threshold(constant, sparsity=0.8).backward()
    assert torch.equal(constant.grad, torch.full((1, 4), 0.25))


@few
@given(st.integers(0, 3), st.integers(0, 5), st.integers(0, 2**15 - 1))
def test_indices_and_masks_are_inverse(rows, size, bits):
    mask = torch.tensor([bits >> i & 1 == 1 for i in range(rows * size)], dtype=torch.bool).view(rows, size)
    indices, counts = mask_to_indices(mask)
    assert counts.tolist() == [sum(row) for row in mask.tolist()]
    for row, kept, count in zip(mask.tolist(), indices.tolist(), counts.tolist(), strict=True):
        assert kept == [i for i in range(size) if row[i]] + [-1] * (len(kept) - count)
    assert torch.equal(indices_to_mask(indices, size), mask)


def test_empty_rows_and_empty_tensors():
    assert topk_mask(torch.ones(3, 0), sparsity=0.5).shape == (3, 0)
    assert topk_indices(torch.ones(0, 4), 2).shape == (0, 2)
    assert nm_mask(torch.ones(0, 4), n=1, m=2).shape == (0, 4)
    assert batch_topk_mask(torch.ones(2, 0), k=0).shape == (2, 0)
    assert top_p_mask(torch.ones(2, 0), p=0.5).shape == (2, 0)
    assert statistical_topk_mask(torch.ones(2, 0), sparsity=0.5).shape == (2, 0)
    assert block_topk_mask(torch.ones(0, 4), block=(2, 2), sparsity=0.5).shape == (0, 4)


row = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk_mask(row, k=5), r"topk_mask: k must be in \[0, 4\], got 5"),
        (lambda: topk_mask(row, k=1, sparsity=0.5), "topk_mask: exactly one of k and sparsity must be given, got both"),
        (lambda: topk_mask(row), "got neither"),
        (lambda: topk_mask(row, sparsity=1.0), r"topk_mask: sparsity must be in \[0, 1\), got 1.0"),
        (lambda: topk_mask(row, k=1, dim=2), r"topk_mask: dim must be in \[-2, 1\], got 2"),
        (lambda: topk_mask(torch.tensor(1.0), k=1), "score must have at least 1 dimension, got a scalar"),
        (lambda: topk_indices(row, -1), r"topk_indices: k must be in \[0, 4\], got -1"),
        (lambda: global_topk_mask(row, k=9), r"global_topk_mask: k must be in \[0, 8\], got 9"),
        (lambda: global_topk_masks({}, k=0), "global_topk_masks: scores must hold at least one tensor, got none"),
        (lambda: batch_topk_mask(row, k=5), r"batch_topk_mask: k must be in \[0, 4\], got 5"),
        (lambda: threshold_mask(row, torch.ones(3)), r"threshold must broadcast to .* \[2, 4\], got shape \[3\]"),
        (lambda: threshold_mask(row, torch.ones(5, 2, 4)), "threshold must broadcast"),
        (lambda: threshold_mask(row, NAN), "threshold must be a number, got nan"),
        (lambda: top_p_mask(row, p=0.0), r"top_p_mask: p must be in \(0, 1\], got 0.0"),
        (lambda: nm_mask(row, n=3, m=2), r"nm_mask: n must be at most m \(2\), got 3"),
        (lambda: nm_mask(row, n=1, m=3), r"nm_mask: m must divide the size of dim -1 \(4\), got 3"),
        (lambda: block_topk_mask(row, block=(2, 3), sparsity=0.5), r"block must divide a tiled dimension \(4\), got 3"),
        (lambda: block_topk_mask(row, block=(), sparsity=0.5), r"block must have between 1 and 2 sizes, got \(\)"),
        (lambda: statistical_threshold(row, sparsity=-0.1), r"sparsity must be in \[0, 1\), got -0.1"),
        (lambda: indices_to_mask(torch.tensor([4]), 4), r"every index must be in \[-1, 3\], got 4"),
        (lambda: num_kept(-1, 0.5), "num_kept: size must be at least 0, got -1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_bad_types():
    with pytest.raises(InputTypeError, match=r"score must be real numbers, got torch.bool"):
        topk_mask(torch.ones(3, dtype=torch.bool), k=1)
    with pytest.raises(InputTypeError, match="score must be a tensor, got list"):
        topk_mask([1.0], k=1)
    with pytest.raises(InputTypeError, match=r"scores must share one dtype, got \['torch.float32', 'torch.float64'\]"):
        global_topk_masks({"a": torch.ones(2), "b": torch.ones(2).double()}, k=1)
    with pytest.raises(InputTypeError, match=r"indices must be integers, got torch.float32"):
        indices_to_mask(torch.ones(2), 4)
    with pytest.raises(InputTypeError, match=r"mask must be bool, got torch.float32"):
        mask_to_indices(torch.ones(2))


def test_selection_needs_no_full_sort(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "sort", None)
    assert select.topk_mask(torch.ones(4), k=2).tolist() == [True, True, False, False]
