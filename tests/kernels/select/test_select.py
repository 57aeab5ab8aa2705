"""Selected entries against Python's sort, for every twin: order, ties, NaN, counts, gradients."""

import math
import statistics

import pytest
import torch

from paucity.checks import InputError, InputTypeError
from paucity.kernels.select import op, reference, statistical_topk, threshold_select, topk, topk_mask
from paucity.measure.flops import flops

DTYPES = [torch.float32, torch.bfloat16]
SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, -1.0]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def rows_of(kind, rows, n, dtype):
    gen = torch.Generator().manual_seed(n)
    x = torch.randn(rows, n, generator=gen)
    if kind == "ties":
        x = x.round()
    elif kind == "relu":
        x = (x - 2).relu()
    elif kind == "constant":
        x = torch.full_like(x, -2.5)
    elif kind == "sorted":
        x = x.sort(dim=-1).values
    elif kind == "special":
        x = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (rows, n), generator=gen)]
    elif kind == "peak":  # few high entries that a sample at even distances misses
        x = torch.zeros_like(x)
        x[:, 1 : 1 + n // 9] = 5
    return x.to(dtype)


def naive_topk(row, k, by_abs):
    def key(i):
        value = abs(row[i]) if by_abs else row[i]
        return (math.isnan(value), 0 if math.isnan(value) else -value, i)

    return sorted(range(len(row)), key=key)[:k]


@pytest.mark.parametrize("by_abs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "ties", "relu", "constant", "sorted", "special", "peak"])
def test_topk_matches_sort(twin, kind, dtype, by_abs):
    for n, k in ((1, 1), (63, 5), (63, 63), (1000, 20), (1000, 700), (9000, 40), (9000, 1500)):
        if twin.name == "triton" and n > 1000:
            continue
        x = rows_of(kind, 2, n, dtype)
        values, indices = (each.cpu() for each in topk(x.to(twin.device), k, by_abs=by_abs))
        assert (values.dtype, indices.dtype) == (dtype, torch.int32)
        expected = torch.tensor([naive_topk(row, k, by_abs) for row in x.tolist()])
        assert torch.equal(indices.long(), expected)
        assert torch.equal(values.view(torch.uint8), x.gather(-1, expected).view(torch.uint8))  # also -0 and NaN


@pytest.mark.parametrize("by_abs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "ties", "relu", "constant", "special"])
def test_a_mask_is_of_the_entries_of_topk(twin, kind, dtype, by_abs):
    for n, k in ((1, 1), (4, 2), (4, 0), (4, 4), (7, 3), (32, 8), (33, 8), (1000, 500), (1000, 999)):
        x = rows_of(kind, 5, n, dtype)
        mask = topk_mask(x.to(twin.device), k, by_abs=by_abs).cpu()
        assert mask.dtype == torch.bool
        for row, kept in zip(x.tolist(), mask, strict=True):
            assert kept.nonzero().squeeze(-1).tolist() == sorted(naive_topk(row, k, by_abs))
    strided = torch.randn(6, 10, device=twin.device).T
    assert torch.equal(topk_mask(strided, 2), topk_mask(strided.contiguous(), 2))
    assert topk_mask(torch.zeros(0, 4), 2).shape == (0, 4)


@pytest.mark.parametrize("by_abs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "special"])
def test_threshold_select_matches_loop(twin, kind, dtype, by_abs):
    for n, capacity in ((1, 0), (1, 1), (63, 63), (63, 7), (1000, 33), (1000, 1000)):
        x = rows_of(kind, 3, n, dtype)
        threshold = torch.tensor([[0.5], [-0.25], [1e9]])
        got = threshold_select(x.to(twin.device), threshold.to(twin.device), capacity=capacity, by_abs=by_abs)
        values, indices, counts = (each.cpu() for each in got)
        assert (values.dtype, indices.dtype, counts.dtype) == (dtype, torch.int32, torch.int32)
        for row, limit, value, index, count in zip(x.tolist(), threshold, values, indices, counts, strict=True):
            kept = [i for i, entry in enumerate(row) if (abs(entry) if by_abs else entry) > limit.item()]
            assert count == len(kept)
            kept = kept[:capacity]
            assert index.tolist() == kept + [-1] * (capacity - len(kept))
            assert value.tolist() == [row[i] for i in kept] + [0.0] * (capacity - len(kept))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 9), (1000, 50), (1000, 1000), (4097, 400)])
def test_statistical_topk_matches_formula(twin, n, k, dtype):
    for shift in (0.0, 100.0 if dtype == torch.float32 else 2.0):
        x = rows_of("normal", 3, n, dtype) + shift
        values, indices, counts = (each.cpu() for each in statistical_topk(x.to(twin.device), k, capacity=n))
        for row, value, index, count in zip(x, values, indices, counts, strict=True):
            kept = int(count)
            entries = row.double()
            limit = -math.inf
            if k < n:
                deviations = statistics.NormalDist().inv_cdf(1 - k / n)
                limit = float(entries.mean() + entries.std(correction=0) * deviations)
            slack = 1e-5 * (1 + abs(shift)) if dtype == torch.float32 else 0.02 * (1 + abs(shift))
            assert int((entries > limit + slack).sum()) <= kept <= int((entries > limit - slack).sum())
            assert (index[:kept].diff() > 0).all()
            assert torch.equal(value[:kept], row[index[:kept].long()])
            assert (index[kept:] == -1).all()
            assert (value[kept:] == 0).all()
            if kept < n:
                others = torch.ones(n, dtype=torch.bool)
                others[index[:kept].long()] = False
                assert kept == 0 or row[others].max() < value[:kept].min()
    short = [each.cpu() for each in statistical_topk(x.to(twin.device), k, capacity=n // 50)]
    assert torch.equal(short[2], counts)
    assert torch.equal(short[1], indices[:, : n // 50])
    assert statistical_topk(x.to(twin.device), k)[0].shape == (3, min(n, math.ceil(1.25 * k) + 16))


def test_constant_and_unordered_rows(twin):
    x = torch.tensor([[2.0] * 40, [math.nan] + [1.0] * 39, [math.inf] + [0.0] * 39], device=twin.device)
    values, indices, counts = statistical_topk(x, 4)
    assert counts.tolist() == [0, 0, 0]
    assert (values == 0).all()
    assert (indices == -1).all()


def test_shapes_strides_and_no_rows(twin):
    x = rows_of("normal", 6, 70, torch.float32).to(twin.device)
    wide = x.T.contiguous().T.view(2, 3, 70)
    expected = topk(x, 8)
    for got, other in zip(topk(wide, 8), expected, strict=True):
        assert torch.equal(got, other.view(2, 3, 8))
    expected = threshold_select(x, 0.3, capacity=50)
    for limit in (0.3, torch.tensor(0.3), torch.full((3, 1), 0.3), torch.full((2, 1, 1), 0.3)):
        limit = limit.to(twin.device) if torch.is_tensor(limit) else limit
        for got, other in zip(threshold_select(wide, limit, capacity=50), expected, strict=True):
            assert torch.equal(got, other.view(2, 3, *other.shape[1:]))
    assert topk(x[0], 3)[0].shape == (3,)
    assert threshold_select(x[0], 0.0, capacity=4)[2].shape == ()
    assert topk(x[:0], 3)[1].shape == (0, 3)
    assert topk(x[:, :0], 0)[0].shape == (6, 0)
    assert threshold_select(x[:, :0], 0.0, capacity=0)[2].tolist() == [0] * 6
    assert statistical_topk(x[:0], 3)[2].shape == (0,)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: topk(x, 7, by_abs=True)[0],
        lambda x: threshold_select(x, 0.2, capacity=20)[0],
        lambda x: statistical_topk(x, 9)[0],
    ],
)
def test_gradient_reaches_selected_entries(twin, function):
    x = rows_of("normal", 3, 63, torch.float32).to(twin.device).requires_grad_()
    values = function(x)
    weights = torch.rand_like(values) + 0.5
    (grad,) = torch.autograd.grad(values, x, weights)
    expected = torch.zeros(3, 63)
    for row in range(3):
        for value, weight in zip(values[row].tolist(), weights[row].tolist(), strict=True):
            if value:
                expected[row, x[row].tolist().index(value)] = weight
    assert torch.equal(grad.cpu(), expected)


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    x = rows_of("normal", 2, 9, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: topk(x, 4)[0], (x,))
    assert torch.autograd.gradcheck(lambda x: threshold_select(x, 0.0, capacity=3)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda x: topk(x, 4)[0] ** 2, (x,))


@pytest.mark.parametrize("name", ["topk", "threshold_select", "statistical_topk"])
def test_operators_check_and_compile(twin, name):
    x = rows_of("normal", 3, 40, torch.float32).to(twin.device).requires_grad_()
    args = {"topk": (x, 5, False), "threshold_select": (x, x.detach()[:, 0], 20, True), "statistical_topk": (x, 6, 20)}
    torch.use_deterministic_algorithms(False)  # opcheck compares fresh memory
    torch.library.opcheck(getattr(torch.ops.paucity, name).default, args[name])
    functions = {"topk": topk, "statistical_topk": statistical_topk}
    function = functions.get(name, lambda x, k: threshold_select(x, 0.1, capacity=k))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(one, other) for one, other in zip(compiled(x, 5), function(x, 5), strict=True))
    assert flops(lambda: function(x, 5)) == 0


@pytest.mark.usefixtures("native_twin")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(threads, dtype):
    x = rows_of("normal", 7, 5000, dtype)
    got = [*topk(x, 100), *statistical_topk(x, 100)]
    torch.set_num_threads(1)
    alone = [*topk(x, 100), *statistical_topk(x, 100)]
    assert all(torch.equal(one, other) for one, other in zip(got, alone, strict=True))
    assert torch.equal(got[1], reference.topk(x, 100, False)[1])


def test_bad_input(twin):
    x = torch.randn(3, 8, device=twin.device)
    for k in (-1, 9):
        with pytest.raises(InputError, match=rf"topk: k must be in \[0, 8\], got {k}"):
            topk(x, k)
        with pytest.raises(InputError, match=rf"capacity must be in \[0, 8\], got {k}"):
            threshold_select(x, 0.0, capacity=k)
    with pytest.raises(InputError, match=r"statistical_topk: k must be in \[1, 8\], got 0"):
        statistical_topk(x, 0)
    with pytest.raises(InputError, match=r"threshold must broadcast to \[3, 1\], got shape \[3\]"):
        threshold_select(x, x[:, 0], capacity=2)
    with pytest.raises(InputError, match="threshold must be a number, got nan"):
        threshold_select(x, math.nan, capacity=2)
    with pytest.raises(InputTypeError, match="threshold must be floating point"):
        threshold_select(x, torch.ones(3, 1, dtype=torch.int64), capacity=2)
    with pytest.raises(InputTypeError, match=r"x must be floating point, got torch.int32"):
        topk(x.int(), 2)
    with pytest.raises(InputError, match="x must have at least 1 dimension"):
        topk(x[0, 0], 1)
    assert op.topk(x, 0, False)[0].shape == (3, 0)
