"""Every twin of decode attention against loops over every query and key."""

import functools
import math

import pytest
import torch

from paucity.checks import InputError
from paucity.kernels import native
from paucity.kernels.decode import decode_attention
from paucity.measure.flops import flops


def inputs(heads, kv_heads, queries, keys, dim, value_dim, *, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim))
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]


def some_pages(rows, heads, keys, page_size, share, *, seed=1):
    """Random pages in random order; the first and the third entries of a list are none."""
    count = -(-keys // page_size)
    generator = torch.Generator().manual_seed(seed)
    lists = [torch.randperm(count, generator=generator)[: max(4, int(count * share))] for _ in range(rows * heads)]
    pages = torch.stack(lists).view(rows, heads, -1)
    pages[..., [0, 2]] = -1
    return pages


def naive(query, key, value, pages=None, *, page_size=1, lengths=None, padding=None, softcap=None, window=None):
    """Output and lse in float64, key by key."""
    (batch, heads, queries, dim), (kv_heads, keys) = query.shape, key.shape[1:3]
    out = torch.zeros(batch, heads, queries, value.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    for b in range(batch):
        length = keys if lengths is None else int(lengths[b])
        for h in range(heads):
            owner = h * kv_heads // heads
            listed = range(keys)
            if pages is not None:
                numbers = pages[b % pages.shape[0], owner % pages.shape[1]].tolist()
                listed = [p * page_size + i for p in numbers if p >= 0 for i in range(page_size)]
            for i in range(queries):
                stands = length - queries + i
                seen = [j for j in listed if j < length and j <= stands and (window is None or j > stands - window)]
                seen = [j for j in seen if padding is None or padding[b, j]]
                if not seen:
                    continue
                logits = key[b, owner, seen].double() @ query[b, h, i].double() / math.sqrt(dim)
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                lse[b, h, i] = logits.logsumexp(0)
                out[b, h, i] = logits.softmax(0) @ value[b, owner, seen].double()
    return out, lse


def check(got, expected, dtype):
    tolerance = 2e-5 if dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(got[0].cpu().double(), expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[1].cpu().double(), expected[1], atol=2e-5, rtol=1e-5)


CASES = [  # heads, heads of keys, queries, keys, dim, value dim, page size, share (None lists everything)
    (1, 1, 1, 1, 1, 1, 1, None),
    (4, 2, 1, 63, 8, 8, 1, 0.5),
    (6, 2, 3, 63, 33, 20, 16, 0.7),
    (2, 1, 9, 40, 16, 40, 7, None),
]
LONG = [
    (8, 2, 1, 1000, 64, 128, 1, 0.3),
    (4, 4, 2, 1000, 40, 63, 32, 0.6),
    (8, 1, 2, 1000, 128, 96, 64, None),
    (5, 1, 1, 3000, 16, 33, 16, 0.9),
]
OPTIONS = {
    "plain": {},
    "lengths": {"lengths": torch.tensor([0, 31])},
    "padding": {},  # of the keys' number
    "window": {"window": 11, "softcap": 1.5},
}


@functools.cache
def solved(case, option, dtype):
    """Tensors, pages, options and what loops over them give."""
    *shape, page_size, share = case
    tensors, keys, options = inputs(*shape, dtype=dtype), shape[3], dict(OPTIONS[option])
    if option == "lengths":
        options["lengths"] = options["lengths"].clamp(max=keys)
    if option == "padding":
        options["padding"] = torch.arange(keys) >= torch.tensor([[0], [7]])
    pages = None if share is None else some_pages(2, shape[1], keys, page_size, share)
    return tensors, pages, options, naive(*tensors, pages, page_size=page_size, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("case", [*CASES, *LONG], ids=str)
def test_matches_naive(twin, case, option, dtype):
    page_size = case[6]
    if twin.name == "triton" and case in LONG:
        pytest.skip("too slow for the interpreter")
    (query, key, value), pages, options, expected = solved(case, option, dtype)
    moved = {name: x.to(twin.device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    placed = [x.to(twin.device) for x in (query, key, value)]
    pages = None if pages is None else pages.to(twin.device)
    got = decode_attention(*placed, pages, page_size=page_size, return_lse=True, **moved)
    assert got[0].dtype == dtype
    check(got, expected, dtype)


def test_what_is_not_seen_is_not_used(twin):
    """NaN in every key that is not listed, is padding, is outside of the length or of the window."""
    query, key, value = (x.to(twin.device) for x in inputs(4, 2, 1, 70, 16, 24))
    pages = torch.tensor([[[3, -1, 1, 7]], [[0, 2, -1, 5]]], dtype=torch.int32)
    lengths, padding = torch.tensor([62, 70]), torch.arange(70) >= torch.tensor([[10], [20]])
    options = {"page_size": 8, "lengths": lengths, "padding": padding, "window": 60}
    expected = naive(query.cpu(), key.cpu(), value.cpu(), pages, **options)
    covered = torch.zeros(2, 70, dtype=torch.bool)
    for b in range(2):
        for page in pages[b, 0].tolist():
            covered[b, max(page, 0) * 8 : page * 8 + 8] |= page >= 0
    at = torch.arange(70)
    covered &= padding & (at < lengths[:, None]) & (at > lengths[:, None] - 1 - 60)
    assert 0 < covered.sum() < 60
    unseen = ~covered[:, None, :, None].to(twin.device)
    moved = {name: x.to(twin.device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    for dtype in (torch.float32, torch.bfloat16):
        poisoned = [x.masked_fill(unseen, math.nan).to(dtype) for x in (key, value)]
        got = decode_attention(query.to(dtype), *poisoned, pages.to(twin.device), return_lse=True, **moved)
        assert got[0].isfinite().all()
        if dtype == torch.float32:
            check(got, expected, dtype)


def test_a_slice_of_a_larger_buffer_is_read_where_it_lies(twin):
    query, key, value = (x.to(twin.device) for x in inputs(4, 2, 2, 33, 16, 24))
    buffers = [torch.full((2, 3, 50, x.shape[-1] + 5), math.nan, device=twin.device) for x in (key, value)]
    slices = [b[:, 1:, 9:42, : x.shape[-1]] for b, x in zip(buffers, (key, value), strict=True)]
    for part, x in zip(slices, (key, value), strict=True):
        part.copy_(x)
    expected = decode_attention(query, key, value)
    assert torch.equal(decode_attention(query, *slices), expected)
    turned = [x.mT.contiguous().mT for x in (key, value)]  # the last stride is not 1: copied, still right
    assert torch.equal(decode_attention(query.transpose(0, 1).contiguous().transpose(0, 1), *turned), expected)


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
def test_a_cache_is_not_copied(monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "native")
    buffer = torch.zeros(1, 2, 9_000, 64)
    query, pages = torch.zeros(1, 2, 1, 64), torch.zeros(1, 1, 1, dtype=torch.int64)
    decode_attention(query, buffer[:, :, :9], buffer[:, :, :9], pages)
    with torch.profiler.profile(profile_memory=True) as profile:
        decode_attention(query, buffer[:, :, :8_999], buffer[:, :, 1:], pages)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()) < 10_000


def test_empty_lists_see_nothing(twin):
    query, key, value = (x.to(twin.device) for x in inputs(4, 2, 2, 9, 8, 8))
    for pages in (torch.full((1, 1, 3), -1), torch.empty(2, 2, 0, dtype=torch.int32)):
        out, lse = decode_attention(query, key, value, pages.to(twin.device), return_lse=True)
        assert (out == 0).all()
        assert (lse == -math.inf).all()
    out = decode_attention(query, key[:, :, :0], value[:, :, :0])
    assert (out == 0).all()


def test_a_page_may_be_longer_than_the_cache(twin):
    query, key, value = (x.to(twin.device) for x in inputs(4, 2, 1, 20, 8, 8))
    pages = torch.zeros(1, 1, 1, dtype=torch.int32, device=twin.device)
    expected = decode_attention(query, key, value)
    assert torch.equal(decode_attention(query, key, value, pages, page_size=2**62), expected)
    long_window = decode_attention(query, key, value, window=2**40)
    torch.testing.assert_close(long_window, expected, atol=1e-6, rtol=1e-6)


def test_parts_merge_by_lse(twin):
    query, key, value = (x.to(twin.device) for x in inputs(4, 2, 1, 64, 8, 8))
    whole, lse = decode_attention(query, key, value, return_lse=True)
    order = torch.randperm(8)
    halves = [
        decode_attention(query, key, value, half[None, None].to(twin.device), page_size=8, return_lse=True)
        for half in (order[:3], order[3:])
    ]
    weights = torch.stack([part[1] for part in halves]).softmax(0).unsqueeze(-1)
    merged = sum(weight * part[0] for weight, part in zip(weights, halves, strict=True))
    torch.testing.assert_close(merged, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.logaddexp(halves[0][1], halves[1][1]), lse, atol=1e-5, rtol=1e-5)


def test_sinks_are_a_key_without_value(twin):
    query, key, value = (x.to(twin.device) for x in inputs(4, 2, 1, 20, 8, 8))
    sinks = torch.tensor([0.5, -math.inf, 3.0, -2.0], device=twin.device)
    out, lse = decode_attention(query, key, value, sinks=sinks, return_lse=True)
    logits = (query.view(2, 2, 2, 8) @ key.mT / math.sqrt(8)).view(2, 4, 20)
    joined = torch.cat([logits, sinks.view(1, 4, 1).expand(2, -1, -1)], -1)
    weights = joined.softmax(-1)[..., :-1].view(2, 2, 2, 20)
    torch.testing.assert_close(out, (weights @ value).view(2, 4, 1, 8), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.squeeze(-1), joined.logsumexp(-1), atol=1e-5, rtol=1e-5)
    nothing = torch.full((1, 1, 1), -1, device=twin.device)
    out, lse = decode_attention(query, key, value, nothing, sinks=sinks, return_lse=True)
    assert (out == 0).all()
    assert torch.equal(lse.squeeze(-1), sinks.expand(2, -1))


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_does_not_depend_on_the_threads(threads, dtype, monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "native")
    query, key, value = inputs(8, 2, 1, 3000, 64, 64, dtype=dtype)
    pages = some_pages(2, 2, 3000, 8, 0.8)
    got = decode_attention(query, key, value, pages, page_size=8, return_lse=True)
    torch.set_num_threads(3 - threads)
    again = decode_attention(query, key, value, pages, page_size=8, return_lse=True)
    assert torch.equal(got[0], again[0])
    assert torch.equal(got[1], again[1])
    order = torch.argsort(torch.rand(pages.shape[-1]))
    shuffled = decode_attention(query, key, value, pages[..., order].int(), page_size=8)
    torch.testing.assert_close(shuffled, got[0], atol=1e-2, rtol=1e-2)


def test_numbers_out_of_range_are_refused(twin):
    query, key, value = (x.to(twin.device) for x in inputs(4, 2, 1, 20, 8, 8))
    for bad in (-2, 3, 2**31 + 1):
        pages = torch.zeros(2, 2, 2, dtype=torch.int64, device=twin.device)
        pages[1, 1, 1] = bad
        with pytest.raises(InputError, match=rf"decode_attention: pages must be in \[-1, 2\], got {bad}\."):
            decode_attention(query, key, value, pages, page_size=8)
    with pytest.raises(InputError, match=r"lengths must be in \[0, 20\], got 21"):
        decode_attention(query, key, value, lengths=torch.tensor([3, 21], device=twin.device))
    with pytest.raises(InputError, match=r"lengths must be in \[0, 20\], got -1"):
        decode_attention(query, key, value, lengths=torch.tensor([-1, 20], device=twin.device))


def test_flops_are_those_of_the_pairs():
    query, key, value = inputs(4, 2, 2, 20, 8, 12)
    pages = torch.tensor([[[0, 4]]])  # keys 0-3 and 16-19; the first query does not see key 19
    assert flops(lambda: decode_attention(query, key, value, pages, page_size=4)) == 2 * 2 * 4 * (7 + 8) * 20
    query.requires_grad_()
    both = flops(lambda: decode_attention(query, key, value, pages, page_size=4).sum().backward())
    assert both == 2 * 2 * 4 * (7 + 8) * (20 + 3 * 8 + 2 * 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 2, 20, 9)}, "key must have shape"),
        ({"value": torch.zeros(2, 2, 21, 8)}, "value must have shape"),
        ({"key": torch.zeros(2, 2, 20, 8).double()}, "key must be torch.float32 like query"),
        ({"key": torch.zeros(2, 3, 20, 8), "value": torch.zeros(2, 3, 20, 8)}, "a multiple of 3 heads"),
        ({"pages": torch.zeros(2, 4, 3).int()}, "pages must fit 2 rows and 2 heads"),
        ({"pages": torch.zeros(2, 2, 3)}, "pages must be int32 or int64"),
        ({"page_size": 0}, "page_size must be at least 1"),
        ({"lengths": torch.ones(3).int()}, "lengths must have shape"),
        ({"lengths": torch.ones(2)}, "lengths must be int32 or int64"),
        ({"padding": torch.ones(2, 20)}, "padding must be bool"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": 0.0}, "softcap must be in"),
        ({"sinks": torch.ones(2)}, "sinks must have shape"),
    ],
)
def test_bad_input(change, message):
    query, key, value = inputs(4, 2, 1, 20, 8, 8)
    given = {"query": query, "key": key, "value": value} | change
    with pytest.raises(InputError, match=message):
        decode_attention(**given)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
def test_starts_shift_everything(twin, listed, option):
    """Positions, pages, lengths and window count from the start; the rest of the buffer is not looked at."""
    query, key, value = inputs(4, 2, 2, 40, 16, 24)
    starts = torch.tensor([[0, 9], [3, 27]])
    lengths = torch.tensor([[40, 20], [37, 2]])
    pages = some_pages(2, 2, 40, 2, 0.8) if listed else None
    options = {name: x for name, x in OPTIONS[option].items() if name != "lengths"}
    padding = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) < 0.7 if option == "padding" else None
    moved = {"lengths": lengths.to(twin.device)} if option == "lengths" else {}
    moved["padding"] = None if padding is None else padding.to(twin.device)
    got = decode_attention(
        *(x.to(twin.device) for x in (query, key, value)),
        None if pages is None else pages.to(twin.device),
        page_size=2,
        starts=starts.to(twin.device),
        return_lse=True,
        **moved,
        **options,
    )
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        part = slice(int(starts[b, h]), int(starts[b, h]) + int(lengths[b, h] if option == "lengths" else 40))
        mine = [x[b : b + 1, h : h + 1, part] for x in (key, value)]
        real = None if padding is None else padding[b : b + 1, part]
        chosen = None if pages is None else pages[b : b + 1, h : h + 1]
        expected = naive(query[b : b + 1, 2 * h : 2 * h + 2], *mine, chosen, page_size=2, padding=real, **options)
        check([x[b : b + 1, 2 * h : 2 * h + 2] for x in got], expected, torch.float32)


def test_lists_of_any_length_share_a_buffer(twin):
    query = inputs(4, 2, 1, 1, 16, 16)[0].to(twin.device)
    flat = torch.randn(2, 100, 16, generator=torch.Generator().manual_seed(5)).to(twin.device)
    flat[:, 60:70] = math.nan  # belongs to nobody
    starts, lengths = torch.tensor([[0, 10], [70, 25]]), torch.tensor([[10, 0], [30, 35]])
    key, value = flat[:, None, None].expand(2, 2, 2, 100, 16)
    given = {"starts": starts.to(twin.device), "lengths": lengths.to(twin.device)}
    out = decode_attention(query, key, value, **given)
    for b, h in ((0, 0), (1, 0), (1, 1)):
        part = slice(int(starts[b, h]), int(starts[b, h] + lengths[b, h]))
        alone = decode_attention(query[b : b + 1, 2 * h : 2 * h + 2], *(x[None, None, part] for x in flat))
        torch.testing.assert_close(out[b : b + 1, 2 * h : 2 * h + 2], alone, atol=1e-6, rtol=1e-6)
    assert (out[0, 2:] == 0).all()


def test_starts_out_of_range_are_refused(twin):
    query, key, value = (x.to(twin.device) for x in inputs(4, 2, 1, 20, 8, 8))
    for bad, lengths, message in (
        (21, None, r"starts must be in \[0, 20\], got 21"),
        (-1, None, r"starts must be in \[0, 20\], got -1"),
        (3, [20, 18], r"lengths must be in \[0, 20 - start\], got 18"),
    ):
        given = {"starts": torch.tensor([0, bad], device=twin.device)}
        given |= {} if lengths is None else {"lengths": torch.tensor(lengths, device=twin.device)}
        with pytest.raises(InputError, match=message):
            decode_attention(query, key, value, **given)
