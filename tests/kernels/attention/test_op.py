"""The operators as PyTorch sees them: traced, compiled, differentiated, counted; and what they refuse."""

import math

import pytest
import torch
from torch.library import opcheck

from paucity.checks import InputError, InputTypeError
from paucity.kernels import dispatch
from paucity.kernels.attention import as_key_lists, attention_recall, sparse_attention
from paucity.kernels.attention.op import flat, sparse_attention_backward_op, sparse_attention_op
from paucity.kernels.attention.problem import Problem
from paucity.measure.flops import flops
from paucity.ops.formats.block import BlockMask
from paucity.ops.formats.stripes import KeyLists, Window

TQ, TK = 9, 12


def patterns():
    some = torch.rand(2, 4, TQ, TK, generator=torch.Generator().manual_seed(1)) < 0.5
    return {
        "window": Window(4, 2, 4),
        "cropped": Window(4, 2, 4, torch.tensor([1, 0])),
        "lists": KeyLists.from_mask(some[:1, :2, :3], q_block=3),
        "blocks": BlockMask.from_dense(some[:, :, :, :9].repeat(1, 1, 1, 2)[..., :TK], q_block=4, k_block=4),
        "exact": BlockMask.from_dense(some, q_block=4, k_block=4, exact=True),
    }


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")


NAMES = list(patterns())
PADDING = torch.arange(TK) >= torch.tensor([[0], [3]])
BIAS = torch.randn(1, 4, TQ, TK, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(inputs, reference, name):
    problem = Problem(patterns()[name], 0.4, 2.0, PADDING, None, True, BIAS.clone().requires_grad_())
    query, key, value = (x.requires_grad_() for x in inputs(TQ, TK))
    opcheck(sparse_attention_op, (query, key, value, *flat(problem), True))
    out, lse = sparse_attention_op(query, key, value, *flat(problem), True)
    tensors = [x.detach() for x in (torch.ones_like(out), torch.ones_like(lse), query, key, value, out, lse)]
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in flat(problem)]
    opcheck(sparse_attention_backward_op, (*tensors, True, *given))
    opcheck(sparse_attention_backward_op, (tensors[0], None, *tensors[2:], False, *given))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(inputs, name):
    pattern, sinks = patterns()[name], torch.linspace(-1, 1, 4)
    leaves = [x.requires_grad_() for x in (*inputs(TQ, TK), BIAS.clone(), sinks)]

    def attend(query, key, value, bias, sinks):
        common = {"bias": bias, "sinks": sinks, "padding": PADDING, "return_lse": True}
        out, lse = sparse_attention(query, key, value, pattern, **common)
        return out.sin().sum() + lse.sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(attend(*leaves), leaves)
    for ours, theirs in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(inputs, reference, name):
    """Query, key, value, bias and sinks, through out and logsumexp."""
    leaves = [*(x[..., :2] for x in inputs(TQ, TK, heads=4)), BIAS, torch.linspace(-1, 1, 4)]
    leaves = [x.double().requires_grad_() for x in leaves]

    def run(query, key, value, bias, sinks):
        common = {"bias": bias, "padding": PADDING, "softcap": 3.0}
        out, lse = sparse_attention(query, key, value, patterns()[name], **common, return_lse=True)
        with_sinks = sparse_attention(query, key, value, patterns()[name], **common, sinks=sinks)
        return out, lse.masked_fill(lse == -math.inf, 0.0), with_sinks

    assert run(*leaves)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_bias_of_any_shape_gets_its_gradient(inputs, reference):
    query, key, value = inputs(TQ, TK)
    for shape in ((1, 1, 1), (2, 1, TQ), (1, 4, 1), (2, 4, TQ)):
        for pattern in patterns().values():
            narrow = torch.randn(*shape, TK, generator=torch.Generator().manual_seed(3)).requires_grad_()
            wide = narrow.detach().expand(2, 4, TQ, TK).clone().requires_grad_()
            grads = [
                torch.autograd.grad(sparse_attention(query, key, value, pattern, bias=bias).sin().sum(), bias)[0]
                for bias in (narrow, wide)
            ]
            torch.testing.assert_close(grads[0], grads[1].sum_to_size(narrow.shape), atol=1e-6, rtol=1e-5)


def test_other_dtypes_take_the_reference(inputs):
    query, key, value = inputs(65, 65)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(sparse_attention(query, key, value, Window(65)), expected, atol=1e-5, rtol=1e-5)
    out, lse = sparse_attention(*(x.half() for x in (query, key, value)), Window(65), return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(out.float(), expected, atol=5e-3, rtol=5e-3)
    out = sparse_attention(*(x.double() for x in (query, key, value)), Window(65))
    torch.testing.assert_close(out, expected.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_of_the_pairs_seen(inputs, name):
    query, key, value = inputs(TQ, TK)
    pattern = patterns()[name]
    kept = pattern.kept_pairs(TQ, TK)
    pairs = int(kept.sum()) * (2 // kept.shape[0]) * (4 // kept.shape[1])
    assert flops(lambda: sparse_attention(query, key, value[..., :3], pattern)) == 2 * (8 + 3) * pairs
    leaves = [x.requires_grad_() for x in (query, key, value)]
    both = flops(lambda: sparse_attention(*leaves, pattern).sum().backward())
    assert both == 2 * (8 + 8) * pairs + 5 * (8 + 8) * pairs


def test_flops_of_lists_that_are_not_causal(inputs):
    query, key, value = inputs(TQ, TK)
    lists = patterns()["lists"]
    seen = lists.positions.new_zeros(2, TK + 1).bool()
    pairs = 0
    for b in range(2):
        for h in range(4):
            for row in range(TQ):
                if PADDING[b, row + TK - TQ]:
                    seen = lists.positions[0, h // 2, row // 3].long()
                    pairs += int(PADDING[b, seen[seen >= 0]].sum())
    counted = flops(lambda: sparse_attention(query, key, value, lists, causal=False, padding=PADDING))
    assert counted == 2 * 16 * pairs


@pytest.mark.parametrize(("tq", "tk", "causal"), [(40, 40, True), (1, 12, True), (300, 700, True), (7, 9, False)])
def test_runs_dense_where_nothing_is_left_out(inputs, reference, tq, tk, causal):
    query, key, value = inputs(tq, tk)
    everything = torch.ones(1, 1, tq, tk, dtype=torch.bool)
    lists = KeyLists.from_mask(everything[:, :, : -(-tq // 8)], q_block=8)
    blocks = BlockMask.from_dense(everything.tril(tk - tq) if causal else everything, q_block=8, k_block=8, exact=True)
    for pattern in (lists, blocks):
        with dispatch.dense_runs() as runs:
            out = sparse_attention(query, key, value, pattern, causal=causal)
        assert list(runs.values()) == [1]
        with dispatch.dense_runs() as runs:
            tiles, _ = sparse_attention(query, key, value, pattern, causal=causal, return_lse=True)
            sparse_attention(query.clone().requires_grad_(), key, value, pattern, causal=causal)
            sparse_attention(query, key, value, pattern, causal=causal, softcap=9.0)
            mask = blocks.to_dense()
            mask[..., -1, 0] = False
            sparse_attention(query, key, value, BlockMask.from_dense(mask, q_block=8, k_block=8, exact=True))
        assert not runs
        torch.testing.assert_close(out, tiles, atol=1e-5, rtol=1e-5)


def test_recall_is_the_mass_kept(inputs):
    query, key, _ = inputs(TQ, TK)
    everything = attention_recall(query, key, Window(12), padding=PADDING)
    assert torch.allclose(everything, torch.ones(2, 4))
    values = torch.eye(TK).expand(2, 2, TK, TK)
    weights = sparse_attention(query, key, values, Window(12), padding=PADDING)
    for name, pattern in patterns().items():
        seen = pattern.to_dense(causal=True) if isinstance(pattern, BlockMask) else pattern.visible(TQ, TK)
        seen = Window(4, 2, 4).visible(TQ, TK, padding=PADDING) if name == "window" else seen
        if name == "cropped":
            continue
        seen = seen if seen.shape[1] in (1, 4) else seen.repeat_interleave(2, dim=1)
        mass = (weights * seen).sum(-1) * PADDING[:, None, TK - TQ :]
        expected = mass.sum(-1) / PADDING[:, TK - TQ :].sum(-1, keepdim=True)
        torch.testing.assert_close(attention_recall(query, key, pattern, padding=PADDING), expected)


@pytest.mark.parametrize("poison", [12, 99, -2])
def test_indices_out_of_range(twin, inputs, poison):
    query, key, value = (x.to(twin.device) for x in inputs(TQ, TK))
    lists = patterns()["lists"]
    positions = lists.positions.clone()
    positions[0, 0, 0, -1] = poison
    wrong = KeyLists(positions.to(twin.device), lists.counts.to(twin.device), lists.q_block)
    with pytest.raises(InputError, match=r"pattern.positions must be in \[-1, 12\)"):
        sparse_attention(query, key, value, wrong)
    exact = patterns()["exact"]
    partial = exact.partial.clone()
    partial[0, 0, 0, 0] = poison + len(exact.elements)
    wrong = BlockMask(exact.blocks, 4, 4, TQ, TK, partial if poison > 0 else partial.fill_(poison), exact.elements)
    with pytest.raises(InputError, match=r"pattern.partial must be in \[-1,"):
        sparse_attention(query, key, value, wrong.to(twin.device))


def test_counts_must_say_where_lists_begin(inputs):
    query, key, value = inputs(TQ, TK)
    lists = patterns()["lists"]
    for counts in (lists.counts - 1, lists.counts + 1, lists.counts + 50):
        with pytest.raises(InputError, match=r"pattern\.counts must"):
            sparse_attention(query, key, value, KeyLists(lists.positions, counts, lists.q_block))


def test_bad_input(inputs):
    query, key, value = inputs(8, 8)
    common = (query, key, value, Window(4))
    lists = KeyLists.from_mask(torch.ones(1, 1, 2, 8).bool(), q_block=4)
    with pytest.raises(InputError, match="query must be at most as long as key"):
        sparse_attention(query, key[:, :, :4], value[:, :, :4], Window(4))
    with pytest.raises(InputError, match="a multiple of 3 heads, got 4"):
        sparse_attention(query, key[:, [0, 0, 1]], value[:, [0, 0, 1]], Window(4))
    with pytest.raises(InputError, match=r"pattern must fit 2 rows, 4 heads and 2 blocks of queries, got \[1, 1, 3\]"):
        sparse_attention(query, key, value, KeyLists.from_mask(torch.ones(1, 1, 3, 8).bool(), q_block=4))
    with pytest.raises(InputError, match="pattern must be for 8 queries and 8 keys"):
        sparse_attention(query, key, value, BlockMask.causal(9, q_block=4, k_block=4))
    with pytest.raises(InputError, match="window must be at least 1"):
        sparse_attention(*common, window=0)
    with pytest.raises(InputTypeError, match=r"value must be torch\.float32 like query"):
        sparse_attention(query, key, value.bfloat16(), Window(4))
    with pytest.raises(InputTypeError, match="query must be floating point"):
        sparse_attention(query.int(), key.int(), value.int(), Window(4))
    with pytest.raises(InputError, match="softcap must be in"):
        sparse_attention(*common, softcap=0.0)
    with pytest.raises(InputError, match="scale must be a number"):
        sparse_attention(*common, scale=math.nan)
    with pytest.raises(InputError, match="causal must be True with a window"):
        sparse_attention(*common, causal=False)
    with pytest.raises(InputError, match="causal must be True with a window"):
        sparse_attention(query, key, value, lists, causal=False, window=3)
    with pytest.raises(InputTypeError, match="padding must be bool"):
        sparse_attention(*common, padding=torch.ones(2, 8))
    with pytest.raises(InputError, match=r"bias must have shape \[2 or 1, 4 or 1, 8 or 1, 8\], got \[1, 2, 8, 8\]"):
        sparse_attention(*common, bias=torch.zeros(1, 2, 8, 8))
    with pytest.raises(InputError, match=r"bias must have shape \[any, any, any, 8\], got \[1, 1, 8, 7\]"):
        sparse_attention(*common, bias=torch.zeros(1, 1, 8, 7))
    with pytest.raises(InputError, match=r"sinks must have shape \[4\], got \[2\]"):
        sparse_attention(*common, sinks=torch.zeros(2))
    with pytest.raises(InputTypeError, match=r"pattern\.positions must be torch\.int32"):
        sparse_attention(query, key, value, KeyLists(lists.positions.long(), lists.counts, 4))
    with pytest.raises(InputError, match=r"pattern\.counts must have shape \[1, 1, 2\], got \[1, 1, 1\]"):
        sparse_attention(query, key, value, KeyLists(lists.positions, lists.counts[..., :1], 4))
    with pytest.raises(InputError, match=r"pattern\.dropped must have shape \[2\]"):
        sparse_attention(query, key, value, Window(4, 1, 4, torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(InputError, match="pattern must have no partial blocks"):
        as_key_lists(patterns()["exact"], TK)
    with pytest.raises(InputError, match="attention_recall: window must be at least 1"):
        attention_recall(query, key, Window(4), window=0)
