"""Every twin against loops over every query and key, in float64."""

import functools
import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch

from paucity.kernels.attention import sparse_attention
from paucity.ops.formats.block import BlockMask
from paucity.ops.formats.stripes import KeyLists, Window

BATCH, HEADS = 2, 4


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    tq: int
    tk: int
    pads: tuple[int, int] | None = None
    window: int | None = None
    softcap: float | None = None
    bias: tuple[int, ...] | None = None
    causal: bool = True
    group_heads: int = 2

    def options(self):
        padding = None if self.pads is None else torch.arange(self.tk) >= torch.tensor(self.pads).unsqueeze(-1)
        bias = None
        if self.bias is not None:
            generator = torch.Generator().manual_seed(3)
            bias = torch.randn(*self.bias, self.tk, generator=generator)
            bias[torch.rand(bias.shape, generator=generator) < 0.1] = -math.inf
        common = {"padding": padding, "window": self.window, "softcap": self.softcap, "causal": self.causal}
        return common | {"bias": bias}

    def inputs(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        shapes = ((HEADS, self.tq), (self.group_heads, self.tk), (self.group_heads, self.tk))
        return [torch.randn(BATCH, *shape, 8, generator=generator).to(dtype) for shape in shapes]


CASES = [
    Case(1, 1),
    Case(5, 7, pads=(0, 2), softcap=2.0, bias=(1, 4, 5)),
    Case(17, 19, pads=(0, 5), softcap=2.0, bias=(1, 4, 17)),
    Case(63, 63, pads=(0, 5)),
    Case(1, 130, softcap=2.0, group_heads=4),
    Case(65, 65, bias=(2, 4, 65), group_heads=1),
    Case(31, 50, pads=(9, 23), window=12),
    Case(40, 40, window=7, bias=(1, 1, 1)),
    Case(40, 40, pads=(40, 0), softcap=1.5, bias=(2, 1, 40)),
    Case(3, 1000, group_heads=4),
    Case(33, 45, pads=(3, 0), causal=False),
    Case(16, 21, softcap=3.0, bias=(1, 4, 1), causal=False),
]


@dataclass(frozen=True)
class Spec:
    """A pattern of random entries: its kind, rows, heads (0: those of the keys), key block or window and sinks."""

    kind: str
    rows: int
    heads: int
    q_block: int
    sizes: tuple[int, ...] = field(default=())


SPECS = [
    Spec("window", 1, 1, 16, (1, 0)),
    Spec("window", 1, 1, 16, (9, 3)),
    Spec("window", 1, 1, 7, (30, 5)),
    Spec("window", 1, 1, 32, (1000, 4)),
    Spec("lists", 2, 4, 16),
    Spec("lists", 1, 0, 7),
    Spec("lists", 2, 1, 64),
    Spec("blocks", 2, 4, 16, (8,)),
    Spec("blocks", 1, 0, 7, (5,)),
    Spec("exact", 2, 4, 16, (8,)),
    Spec("exact", 1, 1, 8, (16,)),
    Spec("exact", 2, 0, 128, (128,)),
]
# Every other pair of the larger cases: the loops take their time.
TABLE = [
    (case, spec)
    for row, case in enumerate(CASES)
    for column, spec in enumerate(SPECS)
    if (case.causal or spec.kind != "window") and (row < 3 or (row + column) % 2)
]
FEW = [(CASES[0], SPECS[0])]
FEW += [(case, spec) for case in CASES[1:3] for spec in SPECS[1::3]]
FEW += [(CASES[row], SPECS[(5 * row + 2) % len(SPECS)]) for row in (3, 6, 7, 8, 10, 11)]


@functools.cache
def build(case, spec):
    """The pattern, and which pairs it keeps, by loops: bool ``[2, 4, tq, tk]``."""
    heads = spec.heads or case.group_heads
    padding, offset = case.options()["padding"], case.tk - case.tq
    if spec.kind == "window":
        size, sinks = spec.sizes
        real = [[True] * case.tk] * BATCH if padding is None else padding.tolist()
        rank = [[sum(row[:j]) for j in range(case.tk)] for row in real]
        return Window(size, sinks, spec.q_block), every_pair(
            case, lambda b, h, row, j: j > row + offset - size or rank[b][j] < sinks
        )
    generator = torch.Generator().manual_seed(1)
    blocks = -(-case.tq // spec.q_block)
    if spec.kind == "lists":
        mask = torch.rand(spec.rows, heads, blocks, case.tk, generator=generator) < 0.3
        mask[0, 0, 0] = False  # nothing at all
        pattern = KeyLists.from_mask(mask, q_block=spec.q_block)
        keeps = lambda b, h, row, j: kept[b][h][row // spec.q_block][j]  # noqa: E731
    elif spec.kind == "blocks":
        k_block = spec.sizes[0]
        mask = torch.rand(spec.rows, heads, blocks, -(-case.tk // k_block), generator=generator) < 0.5
        pattern = BlockMask(mask, spec.q_block, k_block, case.tq, case.tk)
        keeps = lambda b, h, row, j: kept[b][h][row // spec.q_block][j // k_block]  # noqa: E731
    else:
        k_block = spec.sizes[0]
        mask = torch.rand(spec.rows, heads, case.tq, case.tk, generator=generator) < 0.3
        mask[:, :, : case.tq // 2, : case.tk // 2] = True
        mask[:, :, case.tq // 2 :, : case.tk // 3] = False
        pattern = BlockMask.from_dense(mask, q_block=spec.q_block, k_block=k_block, exact=True)
        keeps = lambda b, h, row, j: kept[b][h][row][j]  # noqa: E731
    kept = mask.tolist()
    return pattern, every_pair(case, lambda b, h, row, j: keeps(b % spec.rows, h * heads // HEADS, row, j))


def every_pair(case, keeps):
    sizes = (range(BATCH), range(HEADS), range(case.tq), range(case.tk))
    return torch.tensor([keeps(*at) for at in itertools.product(*sizes)]).view(BATCH, HEADS, case.tq, case.tk)


@functools.cache
def naive(case, spec, dtype):
    """Out, logsumexp and how many pairs are seen, ``[2, 4]``, padded queries not counted."""
    query, key, value = (x.double() for x in case.inputs(dtype))
    options, kept = case.options(), build(case, spec)[1]
    padding, bias, offset = options["padding"], options["bias"], case.tk - case.tq
    out = torch.zeros(BATCH, HEADS, case.tq, 8, dtype=torch.float64)
    lse = torch.full((BATCH, HEADS, case.tq), -math.inf, dtype=torch.float64)
    pairs = torch.zeros(BATCH, HEADS, dtype=torch.int64)
    for b in range(BATCH):
        for h in range(HEADS):
            for row in range(case.tq):
                i = row + offset
                seen = [j for j in kept[b, h, row].nonzero().flatten().tolist() if not case.causal or j <= i]
                seen = [j for j in seen if case.window is None or j > i - case.window]
                seen = [j for j in seen if padding is None or padding[b, j]]
                pairs[b, h] += len(seen) if padding is None or padding[b, i] else 0
                if not seen:
                    continue
                group = h * case.group_heads // HEADS
                logits = key[b, group, seen] @ query[b, h, row] / math.sqrt(8)
                logits = logits if case.softcap is None else case.softcap * torch.tanh(logits / case.softcap)
                if bias is not None:
                    at = (0 if size == 1 else index for size, index in zip(bias.shape, (b, h, row), strict=False))
                    logits = logits + bias[tuple(at)].double()[seen]
                lse[b, h, row] = logits.logsumexp(0)
                if lse[b, h, row] > -math.inf:
                    out[b, h, row] = logits.softmax(0) @ value[b, group, seen]
    return out, lse, pairs


def skip_where_slow(twin, case, spec):
    """Triton's interpreter takes seconds for what the others do in no time: it gets the smallest cases."""
    slow = twin.name == "triton" and twin.device == "cpu"
    if slow and case is not CASES[0] and (case is not CASES[1] or spec not in (SPECS[1], SPECS[10])):
        pytest.skip("Triton's interpreter is slow")


def on(device, x):
    """Tensors, patterns and dictionaries of them, on a device."""
    if isinstance(x, KeyLists):
        return KeyLists(x.positions.to(device), x.counts.to(device), x.q_block)
    if isinstance(x, dict):
        return {name: on(device, entry) for name, entry in x.items()}
    return x.to(device) if hasattr(x, "to") else x


@pytest.mark.parametrize(("case", "spec"), TABLE)
def test_matches_naive(twin, case, spec):
    skip_where_slow(twin, case, spec)
    expected, expected_lse, pairs = naive(case, spec, torch.float32)
    pattern, options = on(twin.device, build(case, spec)[0]), on(twin.device, case.options())
    tensors = on(twin.device, dict(zip(("query", "key", "value"), case.inputs(), strict=True)))
    out, lse = sparse_attention(**tensors, pattern=pattern, **options, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(out.cpu().double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=1e-5, rtol=1e-5)
    alone = sparse_attention(**tensors, pattern=pattern, **options)
    torch.testing.assert_close(alone, out, atol=1e-5, rtol=1e-5)
    if case.causal:
        counted = pattern.kept_pairs(case.tq, case.tk, padding=options["padding"], window=case.window)
        counted = counted.repeat_interleave(HEADS // counted.shape[1], dim=1).expand(BATCH, HEADS)
        assert torch.equal(counted.cpu(), pairs)


@pytest.mark.parametrize(("case", "spec"), FEW)
def test_bfloat16(twin, case, spec):
    skip_where_slow(twin, case, spec)
    expected, expected_lse, _ = naive(case, spec, torch.bfloat16)
    pattern, options = on(twin.device, build(case, spec)[0]), on(twin.device, case.options())
    query, key, value = (x.to(twin.device) for x in case.inputs(torch.bfloat16))
    out, lse = sparse_attention(query, key, value, pattern, **options, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.cpu().double(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=2e-2, rtol=1e-2)


def dense(query, key, value, kept, *, padding, window, softcap, bias, causal, sinks=None):
    """The definition over all pairs, for autograd: out and logsumexp."""
    heads, (tq, tk) = query.shape[1], (query.shape[2], key.shape[2])
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    at = torch.arange(tk - tq, tk).unsqueeze(-1)
    seen = kept & (torch.arange(tk) <= at) if causal else kept
    seen = seen if window is None else seen & (torch.arange(tk) > at - window)
    seen = seen if padding is None else seen & padding[:, None, None]
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits if bias is None else logits + bias
    logits = logits.masked_fill(~seen, -math.inf)
    empty = (logits == -math.inf).all(-1)
    blank = logits.masked_fill(empty.unsqueeze(-1), 0.0)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*blank.shape[:3], 1)
        blank = torch.cat([blank.masked_fill(empty.unsqueeze(-1), -math.inf), column], dim=-1)
        return blank.softmax(-1)[..., :-1] @ value, blank.logsumexp(-1)
    out = (blank.softmax(-1) @ value).masked_fill(empty.unsqueeze(-1), 0.0)
    return out, blank.logsumexp(-1).masked_fill(empty, -math.inf)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("case", "spec"), FEW)
def test_gradients_match_dense(twin, case, spec, with_sinks):
    skip_where_slow(twin, case, spec)
    pattern, kept = build(case, spec)
    options = case.options()
    tensors = [*case.inputs(), torch.linspace(-1, 1, HEADS)]
    tensors += [] if options["bias"] is None else [options.pop("bias")]
    options.pop("bias", None)

    def gradients(function, leaves, device):
        leaves = [x.to(device, copy=True).requires_grad_() for x in leaves]
        query, key, value, sinks, *bias = leaves
        extra = {"bias": bias[0] if bias else None, "sinks": sinks if with_sinks else None}
        out, lse = function(query, key, value, extra)
        some = lse > -math.inf
        loss = (out * torch.arange(out.numel(), device=device).view(out.shape).cos()).sum()
        loss = loss + (lse[some] * lse[some].detach().sin()).sum()
        used = [x for x in leaves if x is not sinks or with_sinks]
        return torch.autograd.grad(loss, used)

    expected = gradients(
        lambda q, k, v, extra: dense(q, k, v, kept, **options, **extra), [x.double() for x in tensors], "cpu"
    )
    moved = on(twin.device, options)
    found = gradients(
        lambda q, k, v, extra: sparse_attention(q, k, v, on(twin.device, pattern), **moved, **extra, return_lse=True),
        tensors,
        twin.device,
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("case", "spec"), FEW[5:11])
def test_bfloat16_gradients(twin, case, spec):
    skip_where_slow(twin, case, spec)
    pattern, kept = build(case, spec)
    tensors, options = case.inputs(torch.bfloat16), case.options()
    weight = torch.randn(BATCH, HEADS, case.tq, 8, generator=torch.Generator().manual_seed(5))
    exact = [x.double().requires_grad_() for x in tensors]
    out, _ = dense(*exact, kept, **options)
    expected = torch.autograd.grad((out * weight).sum(), exact)
    ours = [x.to(twin.device, copy=True).requires_grad_() for x in tensors]
    out = sparse_attention(*ours, on(twin.device, pattern), **on(twin.device, options))
    found = torch.autograd.grad((out.float() * weight.to(twin.device)).sum(), ours)
    for our, their in zip(found, expected, strict=True):
        assert our.dtype == torch.bfloat16
        torch.testing.assert_close(our.cpu().double(), their, atol=4e-2, rtol=4e-2)


@pytest.mark.parametrize(("case", "spec"), FEW)
def test_what_nobody_sees_is_not_read(twin, case, spec):
    skip_where_slow(twin, case, spec)
    pattern, kept = build(case, spec)
    options = case.options()
    query, key, value = case.inputs()
    logits = dense(query, key, torch.eye(case.tk).expand(BATCH, case.group_heads, -1, -1), kept, **options)[0]
    unseen = (logits == 0).view(BATCH, case.group_heads, -1, case.tq, case.tk).all(3).all(2).unsqueeze(-1)
    poisoned = [key.masked_fill(unseen, torch.nan), value.masked_fill(unseen, torch.nan)]

    def run(key, value):
        leaves = [x.to(twin.device, copy=True).requires_grad_() for x in (query, key, value)]
        out = sparse_attention(*leaves, on(twin.device, pattern), **on(twin.device, options))
        return (out.detach(), *torch.autograd.grad(out.sin().sum(), leaves))

    for ours, clean in zip(run(*poisoned), run(key, value), strict=True):
        torch.testing.assert_close(ours, clean, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("case", "spec"), FEW[5:10])
def test_any_strides(twin, case, spec):
    skip_where_slow(twin, case, spec)
    pattern, options = on(twin.device, build(case, spec)[0]), on(twin.device, case.options())
    plain = [x.to(twin.device) for x in case.inputs()]
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    spread = [x.new_full((*x.shape[:3], 16), torch.nan) for x in plain]
    for wide, x in zip(spread, plain, strict=True):
        wide[..., ::2] = x
    expected = run_with_gradients(plain, pattern, options)
    for tensors in (transposed, [wide[..., ::2] for wide in spread]):
        for ours, theirs in zip(run_with_gradients(tensors, pattern, options), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def run_with_gradients(tensors, pattern, options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = sparse_attention(*leaves, pattern, **options)
    # The gradient has strides of its own too.
    cotangent = torch.ones_like(out).transpose(1, 2).contiguous().transpose(1, 2)
    return (out.detach(), *torch.autograd.grad(out, leaves, cotangent))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("case", "spec"), FEW[1:])
def test_threads_do_not_change_a_bit(twin, case, spec, dtype):
    if twin.name != "native":
        pytest.skip("PyTorch's own products may differ")
    pattern, options = build(case, spec)[0], case.options()
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run_with_gradients(case.inputs(dtype), pattern, options))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_cropped_cache_keeps_only_the_sinks_that_are_left(twin):
    case = Case(6, 20)
    query, key, value = (x.to(twin.device) for x in case.inputs())
    dropped = torch.tensor([1, 7])
    out = sparse_attention(query, key, value, Window(4, 3, 4, dropped.to(twin.device)))
    at, j = torch.arange(14, 20).unsqueeze(-1), torch.arange(20)
    kept = torch.stack([(j > at - 4) | (j < max(0, 3 - int(gone))) for gone in dropped])[:, None]
    expected, _ = dense(*(x.cpu() for x in (query, key, value)), kept, **case.options())
    torch.testing.assert_close(out.cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lists", "blocks"])
def test_a_pattern_of_nothing(twin, kind):
    query, key, value = (x.to(twin.device).requires_grad_() for x in Case(9, 11).inputs())
    pattern = KeyLists.from_mask(torch.zeros(1, 1, 3, 11, dtype=torch.bool), q_block=4)
    if kind == "blocks":
        pattern = BlockMask(torch.zeros(1, 1, 3, 3, dtype=torch.bool), 4, 4, 9, 11)
    out, lse = sparse_attention(query, key, value, on(twin.device, pattern), return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    sinks = torch.zeros(HEADS, device=twin.device)
    out, lse = sparse_attention(query, key, value, on(twin.device, pattern), sinks=sinks, return_lse=True)
    assert (out == 0).all()
    assert (lse == 0).all()
    gradients = torch.autograd.grad(out.sum() + lse.sum(), (query, key, value))
    assert all((gradient == 0).all() for gradient in gradients)
