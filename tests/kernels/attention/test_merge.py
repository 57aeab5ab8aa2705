"""Parts of attention that are merged are the whole; learned sinks are one key more."""

import math

import pytest
import torch

from paucity.checks import InputError
from paucity.kernels.attention import merge_attention, sparse_attention
from paucity.ops.formats.stripes import KeyLists, Window


def split(mask, parts):
    owner = torch.randint(parts, mask.shape, generator=torch.Generator().manual_seed(4))
    return [KeyLists.from_mask(mask & (owner == part), q_block=4) for part in range(parts)]


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("sinks", [False, True])
def test_parts_merge_to_the_whole(twin, inputs, left_padding, parts, sinks):
    tensors = [x.to(twin.device) for x in inputs(10, 13)]
    padding = left_padding(13, 0, 6).to(twin.device)
    mask = torch.rand(2, 4, 3, 13, generator=torch.Generator().manual_seed(3)) < 0.7
    logit = torch.linspace(-2, 1, 4).to(twin.device) if sinks else None

    def attend(lists, sinks=None):
        lists = KeyLists(lists.positions.to(twin.device), lists.counts.to(twin.device), lists.q_block)
        return sparse_attention(*tensors, lists, padding=padding, sinks=sinks, return_lse=True)

    expected = attend(KeyLists.from_mask(mask, q_block=4), logit)
    # The sinks take part once.
    pieces = [attend(lists, logit if index == 0 else None) for index, lists in enumerate(split(mask, parts))]
    merged = merge_attention([out for out, _ in pieces], [lse for _, lse in pieces])
    assert sinks or bool((merged[1] == -math.inf).any())
    for ours, whole in zip(merged, expected, strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


def test_gradients_go_through_a_merge(inputs, left_padding, monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    leaves = [x.double().requires_grad_() for x in inputs(10, 13)]
    mask = torch.rand(2, 4, 3, 13, generator=torch.Generator().manual_seed(3)) < 0.7
    padding = left_padding(13, 0, 6)

    def whole(*leaves):
        return sparse_attention(*leaves, KeyLists.from_mask(mask, q_block=4), padding=padding, return_lse=True)

    def merged(*leaves):
        pieces = [sparse_attention(*leaves, part, padding=padding, return_lse=True) for part in split(mask, 3)]
        return merge_attention([out for out, _ in pieces], [lse for _, lse in pieces])

    def gradients(function):
        out, lse = function(*leaves)
        return torch.autograd.grad(out.sin().sum() + lse[lse > -math.inf].cos().sum(), leaves)

    for ours, theirs in zip(gradients(merged), gradients(whole), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs)


def test_a_sink_is_a_key_without_a_value(twin, inputs):
    query, key, value = (x.to(twin.device) for x in inputs(9, 9, heads=2))
    logit = torch.tensor([0.7, -1.3])
    out, lse = sparse_attention(query, key, value, Window(4, 1, 4), sinks=logit.to(twin.device), return_lse=True)
    for b in range(2):
        for h in range(2):
            for i in range(9):
                seen = [j for j in range(i + 1) if j > i - 4 or j == 0]
                logits = (key[b, h, seen] @ query[b, h, i]).cpu().double() / math.sqrt(8)
                weights = torch.cat([logits, logit[h : h + 1].double()]).exp()
                expected = (weights[:-1] / weights.sum()) @ value[b, h, seen].cpu().double()
                torch.testing.assert_close(out[b, h, i].cpu().double(), expected, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(lse[b, h, i].cpu().double(), weights.sum().log(), atol=1e-5, rtol=1e-5)


def test_large_and_missing_parts():
    outs = [torch.full((2, 3), float(n)) for n in range(3)]
    lses = [torch.tensor([1e4, -math.inf]), torch.tensor([1e4, -math.inf]), torch.tensor([-1e4, -math.inf])]
    out, lse = merge_attention([out.bfloat16() for out in outs], lses)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.float(), torch.tensor([[0.5] * 3, [0.0] * 3]))
    torch.testing.assert_close(lse, torch.tensor([1e4 + math.log(2), -math.inf]))


def test_bad_input():
    out, lse = torch.zeros(2, 3), torch.zeros(2)
    for outs, lses in (([], []), ([out], [lse, lse])):
        with pytest.raises(InputError, match="outs must have one entry for each of lses"):
            merge_attention(outs, lses)
    with pytest.raises(InputError, match=r"outs\[1\] must have shape \[2, 3\], got \[2, 4\]"):
        merge_attention([out, torch.zeros(2, 4)], [lse, lse])
    with pytest.raises(InputError, match=r"lses\[0\] must have shape \[2\], got \[3\]"):
        merge_attention([out], [torch.zeros(3)])
    with pytest.raises(InputError, match=r"lses\[0\] must be floating point"):
        merge_attention([out], [torch.zeros(2, dtype=torch.long)])
