"""What no caller should try: empty tensors, absurd sizes, another device, autocast. Every twin answers or refuses."""

import math
import sys
import threading

import pytest
import torch

from paucity.checks import InputError
from paucity.kernels import native
from paucity.kernels.attention import attention_recall, sparse_attention
from paucity.kernels.codes import decode_codes, encode_kept
from paucity.kernels.decode import decode_attention
from paucity.kernels.linear import masked_input_linear, pays, sparse_input_linear, sparse_output_linear
from paucity.kernels.select import threshold_select
from paucity.kernels.spmm import sparse_conv1x1
from paucity.ops.formats import PackedCSR
from paucity.ops.formats.block import BlockMask
from paucity.ops.formats.stripes import KeyLists, Window

WINDOW = Window(3, 1, 2)
META = torch.device("meta")


def qkv(batch=1, heads=2, kv_heads=1, tq=5, tk=5, dim=4, value_dim=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, tq, dim), (batch, kv_heads, tk, dim), (batch, kv_heads, tk, value_dim))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def lists(positions, counts=None, q_block=5):
    positions = torch.tensor(positions, dtype=torch.int32).view(1, 1, 1, -1)
    counts = (positions >= 0).sum(-1) if counts is None else torch.tensor([[[counts]]])
    return KeyLists(positions, counts, q_block)


EMPTY = [{"tq": 0}, {"tq": 0, "tk": 0}, {"batch": 0}, {"heads": 0}, {"dim": 0}, {"value_dim": 0}]


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty_attention_has_an_empty_result_and_gradients(twin, sizes):
    if twin.name == "triton" and not {"dim", "value_dim"}.isdisjoint(sizes):
        pytest.skip("a Triton block has no empty side")
    inputs = [x.to(twin.device).requires_grad_() for x in qkv(**sizes)]
    shape = (*inputs[0].shape[:3], inputs[2].shape[-1])
    calls = [lambda: sparse_attention(*inputs, WINDOW), lambda: decode_attention(*inputs)]
    for call in calls:
        out = call()
        assert out.shape == shape
        grads = torch.autograd.grad(out.sum(), inputs, allow_unused=True)
        assert [g.shape for g in grads if g is not None] == [
            x.shape for g, x in zip(grads, inputs, strict=True) if g is not None
        ]


def test_sizes_beyond_the_text_change_nothing(twin):
    inputs = [x.to(twin.device) for x in qkv()]
    everything = torch.ones(1, 1, 1, 5, dtype=torch.bool, device=twin.device)
    want = sparse_attention(*inputs, BlockMask(everything[..., :1], 5, 5, 5, 5))
    far = sparse_attention(*inputs, KeyLists.from_mask(everything, q_block=2**40), window=2**70)
    torch.testing.assert_close(far, want)
    torch.testing.assert_close(sparse_attention(*inputs, Window(2**70, 2**70)), want)
    newest = (inputs[0][:, :, -1:], *inputs[1:])
    pages = torch.zeros(1, 1, 1, dtype=torch.int64, device=twin.device)
    torch.testing.assert_close(decode_attention(*newest, pages, page_size=2**70, window=2**70), want[:, :, -1:])


@pytest.mark.parametrize("positions", [[3, 1, 0], [1, 1, 2], [0, -1, 2]], ids=str)
def test_lists_that_do_not_ascend_are_refused(twin, positions):
    inputs = [x.to(twin.device) for x in qkv()]
    pattern = lists(positions, 3)
    pattern = KeyLists(pattern.positions.to(twin.device), pattern.counts.to(twin.device), 5)
    with pytest.raises(InputError, match=r"pattern\.positions must ascend"):
        sparse_attention(*inputs, pattern)


def test_a_key_that_masks_hide_together_is_not_read(twin):
    """Key 2 is hidden from query 2 by the bias, from query 3 by the window."""
    query, key, value = (x.to(twin.device) for x in qkv())
    bias = torch.zeros(1, 1, 5, 5, device=twin.device)
    bias[0, 0, 2, 2] = -math.inf
    key[:, :, 2] = value[:, :, 2] = math.nan
    out = sparse_attention(query, key, value, Window(1, 0, 4), bias=bias)
    assert out.isfinite().all()
    assert (out[:, :, 2] == 0).all()


def on_meta():
    query, key, value = qkv()
    padding = torch.ones(1, 5, dtype=torch.bool)
    x, weight, mask = torch.ones(2, 4), torch.ones(3, 4), torch.ones(4, dtype=torch.bool)
    index = torch.zeros(2, 1, dtype=torch.int64)
    pages = torch.zeros(1, 1, 1, dtype=torch.int64)
    there = BlockMask.causal(5, q_block=2, k_block=2).to("meta")
    some = lists([0, 1])
    return {
        "attention padding": lambda: sparse_attention(query, key, value, WINDOW, padding=padding.to(META)),
        "attention bias": lambda: sparse_attention(query, key, value, WINDOW, bias=torch.ones(1, 1, 5, 5, device=META)),
        "attention sinks": lambda: sparse_attention(query, key, value, WINDOW, sinks=torch.ones(2, device=META)),
        "attention blocks": lambda: sparse_attention(query, key, value, there),
        "attention lists": lambda: sparse_attention(
            query, key, value, KeyLists(some.positions.to(META), some.counts.to(META), 5)
        ),
        "attention dropped": lambda: sparse_attention(query, key, value, Window(3, 1, 2, torch.tensor([1]).to(META))),
        "decode key": lambda: decode_attention(query, key.to(META), value),
        "decode pages": lambda: decode_attention(query, key, value, pages.to(META)),
        "decode lengths": lambda: decode_attention(query, key, value, lengths=torch.tensor([3]).to(META)),
        "decode padding": lambda: decode_attention(query, key, value, padding=padding.to(META)),
        "encode bias": lambda: encode_kept(x, weight, torch.ones(3, device=META), index),
        "decode codes": lambda: decode_codes(x[:, :1], index.to(META), weight),
        "linear weight": lambda: sparse_input_linear(x, weight.to(META), k=1),
        "linear bias": lambda: sparse_input_linear(x, weight, torch.ones(3, device=META), k=1),
        "linear norm": lambda: sparse_input_linear(x, weight, k=1, norm=x[0].to(META)),
        "linear mask": lambda: masked_input_linear(x, weight, mask.to(META)),
        "linear rows": lambda: sparse_output_linear(x, weight, mask[:3].to(META)),
    }


@pytest.mark.parametrize("name", list(on_meta()))
def test_a_tensor_elsewhere_is_refused(name):
    with pytest.raises(InputError, match="must be on cpu"):
        on_meta()[name]()


@pytest.mark.parametrize("twin_name", ["reference", "native"])
def test_autocast_changes_neither_dtype_nor_values(monkeypatch, twin_name):
    if twin_name == "native" and native.library() is None:
        pytest.skip("no native library here")
    monkeypatch.setenv("PAUCITY_KERNELS", twin_name)
    generator = torch.Generator().manual_seed(0)
    query, key, value = qkv()
    x, weight = torch.randn(20, 12, generator=generator), torch.randn(7, 12, generator=generator)
    packed, image = PackedCSR.pack(weight), torch.randn(1, 12, 3, 3, generator=generator)
    calls = [
        lambda: sparse_attention(query, key, value, WINDOW),
        lambda: decode_attention(query, key, value),
        lambda: sparse_input_linear(x, weight, threshold=0.5),
        lambda: masked_input_linear(x, weight, x > 0),
        lambda: sparse_output_linear(x, weight, x[:, :7] > 0),
        lambda: sparse_conv1x1(image, packed),
    ]
    for call in calls:
        want = call()
        with torch.autocast("cpu", torch.bfloat16):
            got = call()
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


def test_absurd_arguments_are_refused_in_one_line():
    query, key, value = qkv()
    narrow = [x.to(torch.float8_e4m3fn) for x in (query, key, value)]
    refused = [
        (lambda: sparse_attention(None, key, value, WINDOW), "query must be a tensor"),
        (lambda: attention_recall(None, key, WINDOW), "query must be a tensor"),
        (lambda: sparse_attention(query, key, value, None), "pattern must be a BlockMask, KeyLists or Window"),
        (lambda: sparse_attention(query[:, :0], key[:, :0], value[:, :0], WINDOW), "a multiple of 0 heads"),
        (lambda: sparse_attention(*narrow, WINDOW), "at least 16 bits"),
        (lambda: decode_attention(*narrow), "at least 16 bits"),
        (lambda: sparse_input_linear(narrow[0], narrow[0][0, 0], k=1), "at least 16 bits"),
        (lambda: decode_codes(narrow[0][0, 0], torch.zeros(5, 4, dtype=torch.int64), narrow[0][0, 0]), "at least 16"),
        (lambda: sparse_attention(query, key, value, WINDOW, softcap=math.inf), "softcap must be in"),
        (lambda: sparse_attention(query, key, value, WINDOW, scale=math.inf), "scale must be in"),
        (lambda: sparse_attention(query, key, value, Window(3, 1, 2, torch.ones(1))), r"dropped must be torch\.int64"),
        (lambda: decode_attention(query, key, value, scale=math.nan), "scale must be a number"),
        (lambda: decode_attention(query, key, value, scale="x"), "scale must be a number"),
        (lambda: decode_attention(query, key, value, softcap=math.inf), "softcap must be in"),
        (lambda: sparse_conv1x1(torch.ones(1, 4, 2, 2), PackedCSR.pack(torch.ones(2, 4)), [1, 2]), "bias must be a t"),
        (lambda: pays(None), "weight must be a tensor"),
    ]
    for call, message in refused:
        with pytest.raises(InputError, match=message):
            call()


def test_thresholds_beyond_the_dtype_select_all_or_nothing(twin):
    x = torch.tensor([1.0, -2.0], device=twin.device)
    assert threshold_select(x, 1e300, capacity=2)[2].item() == 0
    assert threshold_select(x, -1e300, capacity=2)[2].item() == 2


def test_a_stride_beyond_the_image_takes_its_first_pixel(twin):
    image = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(twin.device)
    packed = PackedCSR.pack(torch.ones(2, 4)).to(twin.device)
    got = sparse_conv1x1(image, packed, stride=2**70)
    torch.testing.assert_close(got, image[:, :, :1, :1].sum(1, keepdim=True).expand(1, 2, 1, 1))


@pytest.mark.parametrize("tokens", [0, 2])
def test_linears_without_inputs_give_the_bias(twin, tokens):
    x, weight = torch.ones(tokens, 0, device=twin.device), torch.ones(3, 0, device=twin.device)
    bias, mask = torch.arange(3.0, device=twin.device), torch.ones(0, dtype=torch.bool, device=twin.device)
    outs = [
        sparse_input_linear(x, weight, bias, k=0),
        masked_input_linear(x, weight, mask, bias),
        sparse_output_linear(x, weight, torch.ones(3, dtype=torch.bool, device=twin.device), bias),
    ]
    for out in outs:
        assert torch.equal(out, bias.expand(tokens, 3))


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
def test_threads_may_ask_for_the_instruction_sets_at_once():
    built, seen = native.library(), set()
    before = sys.getswitchinterval()

    def ask():
        for _ in range(20000):
            seen.add(built.paucity_instruction_sets())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(seen) == 1
