"""The twins of the tree search against the reference (which tests/attention/test_hierarchical.py holds to loops)."""

import pytest
import torch

from paucity.checks import InputError, InputTypeError
from paucity.kernels import native
from paucity.kernels.tree import op, reference, tree_select
from paucity.measure.flops import flops

OPTIONS = {"k": 32, "q_block": 32, "k_block": 2, "window_size": 20}
CASES = [
    (63, 63, 7, {"k": 8, "q_block": 8, "num_sinks": 1}),
    (1, 1000, 1, {"query_stride": 2}),
    (200, 333, 64, {"query_stride": 2, "window": 150, "num_sinks": 4}),
    (1000, 1000, 33, {"k": 42, "k_block": 3, "q_block": 100, "query_stride": 3, "window": 700, "num_sinks": 3}),
    (130, 700, 16, {"k": 40, "k_block": 1, "q_block": 130}),
]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(tq, tk, dim, dtype, batch=2):
    """Whole numbers, whose products are exact in whatever order; strided, with NaN around them."""
    generator = torch.Generator().manual_seed(tk)
    whole = [torch.randint(-3, 4, (batch, h, t, dim), generator=generator) for h, t in ((4, tq), (2, tk))]
    wider = [torch.full((batch, t.shape[2] + 2, t.shape[1], dim + 3), torch.nan, dtype=dtype) for t in whole]
    views = [x[:, 1:-1, :, :dim].transpose(1, 2) for x in wider]
    for view, x in zip(views, whole, strict=True):
        view.copy_(x)
    return views


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tq", "tk", "dim", "options"), CASES)
def test_twins_agree(twin, monkeypatch, dtype, tq, tk, dim, options):
    if twin.name == "triton":
        pytest.skip("there is no Triton twin: the reference computes")
    query, key = inputs(tq, tk, dim, dtype)
    got = tree_select(query, key, **OPTIONS | options)
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    monkeypatch.setattr(reference, "BOUND", 1 << 16)
    wanted = tree_select(query.double(), key.double(), **OPTIONS | options)
    assert (got.positions.dtype, got.counts.dtype) == (torch.int32, torch.int64)
    assert torch.equal(got.positions, wanted.positions)
    assert torch.equal(got.counts, wanted.counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_real_numbers_choose_alike(native_twin, monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 1500, 64, generator=generator).to(dtype) for _ in range(2))
    got = tree_select(query, key, **OPTIONS)
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    assert (got.positions == tree_select(query, key, **OPTIONS).positions).float().mean() > 0.99


def test_threads_do_not_matter(native_twin):
    query, key = torch.randn(1, 2, 500, 40), torch.randn(1, 2, 500, 40)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(tree_select(query, key, **OPTIONS).positions)
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_operator_contract():
    query, key = torch.randn(1, 4, 70, 8), torch.randn(1, 2, 100, 8)
    arguments = (16, 2, 32, 2, 4, 20, 0)
    torch.library.opcheck(torch.ops.paucity.tree_select, (query, key, *arguments))
    compiled = torch.compile(lambda q, k: op.tree_select(q, k, *arguments)[0] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key), op.tree_select(query, key, *arguments)[0] + 1)
    assert not tree_select(query.requires_grad_(), key, **OPTIONS).positions.requires_grad


def test_flops_are_those_of_the_scores():
    """One query searches 256 keys in 16 segments of 8 blocks of 2: three levels of 32 blocks."""
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 256 + 20, 8)
    assert flops(lambda: tree_select(query, key, **OPTIONS)) == 2 * 2 * 8 * 3 * 32 * 2


@pytest.mark.parametrize("shape", [(0, 4, 5), (1, 0, 5), (1, 4, 0)])
def test_nothing_to_choose_for(shape):
    batch, heads, queries = shape
    lists = tree_select(torch.ones(batch, heads, queries, 8), torch.ones(batch, 2, 40, 8), **OPTIONS)
    assert lists.positions.shape[:2] == (batch, heads)
    assert not lists.counts.any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 33}, r"k must be a multiple of k_block \(2\), got 33"),
        ({"k": 0}, "k must be"),
        ({"q_block": 0}, "q_block must be"),
        ({"k_block": 0}, "k_block must be"),
        ({"window_size": 0}, "window_size must be"),
        ({"num_sinks": -1}, "num_sinks must be"),
        ({"query_stride": 0}, "query_stride must be"),
        ({"window": 0}, "window must be"),
    ],
)
def test_bad_numbers(changed, message):
    x = torch.ones(1, 2, 8, 4)
    with pytest.raises(InputError, match=f"tree_select: {message}"):
        tree_select(x, x, **OPTIONS | changed)


def test_bad_tensors():
    x = torch.ones(1, 2, 8, 4)
    with pytest.raises(InputError, match="query must be at most as long as key"):
        tree_select(x, x[:, :, 1:], **OPTIONS)
    with pytest.raises(InputError, match="query must have a multiple of 2 heads"):
        tree_select(x[:, :1], x, **OPTIONS)
    with pytest.raises(InputTypeError, match="key must be"):
        tree_select(x, x.double(), **OPTIONS)


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "native")
    monkeypatch.setattr("paucity.kernels.tree.native._tree_select", lambda _: 1)
    with pytest.raises(RuntimeError, match="of another version"):
        tree_select(torch.ones(1, 2, 8, 4), torch.ones(1, 2, 8, 4), **OPTIONS)


@pytest.mark.parametrize("changed", [{"k": 1 << 40}, {"k": 1 << 40, "k_block": 1 << 40}, {"q_block": 1 << 40}])
def test_sizes_longer_than_the_text_take_no_more_memory(twin, changed):
    x = torch.randn(1, 2, 8, 4)
    found = tree_select(x, x, **OPTIONS | changed)
    wanted = tree_select(x, x, **OPTIONS | dict.fromkeys(changed, 8))
    assert torch.equal(found.positions, wanted.positions)
    assert torch.equal(found.counts, wanted.counts)
