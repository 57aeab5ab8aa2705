"""The mass of columns and diagonals, and their key lists, against loops, for every twin."""

import pytest
import torch

from paucity.checks import InputError, InputTypeError
from paucity.kernels.lines import line_lists, line_mass, op, reference
from paucity.measure.flops import flops

SIZES = [(1, 1, 4), (63, 63, 7), (130, 130, 64), (31, 50, 16), (3, 40, 64), (1, 33, 16), (40, 40, 10**12)]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # fresh integers are the highest ones
    yield
    torch.use_deterministic_algorithms(False)


def masks(tk, shares=(0.2, 0.05), batch=2, heads=3):
    generator = torch.Generator().manual_seed(tk)
    return [torch.rand(batch, heads, tk, generator=generator) < share for share in shares]


def naive(vertical, slash, num_queries, q_block):
    keys = len(vertical)
    lists = []
    for start in range((keys - num_queries) // q_block * q_block, keys, q_block):
        kept = {j for j in range(keys) if vertical[j] and j < start + q_block}
        for d in slash.nonzero().flatten().tolist():
            kept |= set(range(max(0, start - d), min(keys, start - d + q_block)))
        lists.append(sorted(kept))
    return lists


@pytest.mark.parametrize("shares", [(0.2, 0.05), (0.0, 0.02), (0.3, 0.0), (0.0, 0.0), (1.0, 0.1), (0.1, 1.0)])
@pytest.mark.parametrize(("tq", "tk", "q_block"), SIZES)
def test_lists_match_loops(twin, threads, tq, tk, q_block, shares):
    vertical, slash = masks(tk, shares)
    found = line_lists(vertical.to(twin.device), slash.to(twin.device), num_queries=tq, q_block=q_block)
    assert (found.positions.dtype, found.counts.dtype, found.q_block) == (torch.int32, torch.int64, q_block)
    assert found.positions.shape == (*found.counts.shape, found.counts.max())
    for b in range(2):
        for h in range(3):
            wanted = naive(vertical[b, h], slash[b, h], tq, q_block)
            assert found.counts[b, h].tolist() == [len(keys) for keys in wanted]
            rows = found.positions[b, h].tolist()
            width = found.positions.shape[-1]
            assert rows == [[-1] * (width - len(keys)) + keys for keys in wanted]


@pytest.mark.parametrize(("size", "q_block"), [(90, 16), (1000, 1), (1000, 63)])
def test_long_and_divided_inputs_match_the_reference(twin, threads, size, q_block, monkeypatch):
    if twin.name == "triton":
        from paucity.kernels.lines import triton

        if size > 100:
            pytest.skip("the interpreter is slow")
        monkeypatch.setattr(triton, "_CHUNK", 16)
    vertical, slash = (x.to(twin.device) for x in masks(size, (0.1, 0.02)))
    counts = reference.counts(vertical, slash, size - 20, q_block)
    wanted = reference.positions(vertical, slash, counts, size - 20, q_block, int(counts.max()))
    monkeypatch.setattr(reference, "_ENTRIES", 1000)
    found = line_lists(*(x.mT.contiguous().mT for x in (vertical, slash)), num_queries=size - 20, q_block=q_block)
    assert torch.equal(found.counts, counts)
    assert torch.equal(found.positions, wanted)


@pytest.mark.parametrize("shape", [(0, 3, 9), (2, 0, 9), (2, 3, 0)])
def test_empty(twin, shape):
    masks = torch.ones(shape, dtype=torch.bool, device=twin.device)
    found = line_lists(masks, masks, num_queries=shape[-1], q_block=4)
    assert found.positions.shape == (*shape[:2], -(-shape[-1] // 4), 0)
    nobody = torch.ones(1, 1, 9, dtype=torch.bool, device=twin.device)
    assert line_lists(nobody, nobody, num_queries=0, q_block=4).positions.shape == (1, 1, 0, 0)


def naive_mass(last, key, scale, softcap, window):
    """By dense masks in double precision."""
    last, key = last.double(), key.double().repeat_interleave(last.shape[1] // key.shape[1], 1)
    rows, keys = last.shape[2], key.shape[2]
    logits = last @ key.mT * scale
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    distance = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)
    prob = logits.masked_fill((distance < 0) | (distance >= (window or keys)), -torch.inf).softmax(-1)
    slash = torch.zeros_like(prob[:, :, 0]).index_add_(-1, distance.flatten().clamp(min=0), prob.flatten(-2))
    return prob.sum(-2), slash


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (1, None), (50, 2.0), (10**6, None)])
@pytest.mark.parametrize(("rows", "keys", "dim"), [(1, 1, 8), (63, 63, 7), (64, 200, 64), (70, 131, 33), (5, 1000, 16)])
def test_mass_matches_naive(twin, rows, keys, dim, window, softcap, dtype):
    generator = torch.Generator().manual_seed(keys)
    last, key = (torch.randn(2, n, h, dim, generator=generator).to(dtype).mT.mT for h, n in ((rows, 4), (keys, 2)))
    last, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (last, key))  # divided
    found = line_mass(last.to(twin.device), key.to(twin.device), scale=0.3, softcap=softcap, window=window)
    for mass, wanted in zip(found, naive_mass(last, key, 0.3, softcap, window), strict=True):
        assert mass.dtype == torch.float32
        torch.testing.assert_close(mass.cpu(), wanted.float(), atol=2e-5, rtol=2e-5)


def test_mass_does_not_depend_on_threads(native_twin, threads):
    generator = torch.Generator().manual_seed(0)
    last, key = torch.randn(1, 6, 64, 16, generator=generator), torch.randn(1, 3, 500, 16, generator=generator)
    found = torch.cat(line_mass(last, key, scale=0.5))
    torch.set_num_threads(3 - threads)
    assert torch.equal(torch.cat(line_mass(last, key, scale=0.5)), found)


def test_mass_of_bad_and_empty_input(twin):
    last, key = torch.randn(1, 4, 5, 8, device=twin.device), torch.randn(1, 2, 9, 8, device=twin.device)
    assert line_mass(last[:0], key[:0], scale=1.0)[0].shape == (0, 4, 9)
    assert line_mass(last[:, :, :0], key, scale=1.0)[1].tolist() == [[[0.0] * 9] * 4]
    with pytest.raises(InputError, match=r"last must have at most as many queries as keys \(4\), got 5"):
        line_mass(last, key[:, :, :4], scale=1.0)
    with pytest.raises(InputError, match="heads of key must divide those of last"):
        line_mass(last[:, :3], key, scale=1.0)
    with pytest.raises(InputError, match="key must have dtype"):
        line_mass(last, key.bfloat16(), scale=1.0)
    with pytest.raises(InputError, match=r"key must have shape \[1, any, any, 8\]"):
        line_mass(last, key[..., :7], scale=1.0)
    with pytest.raises(InputError, match="window must be"):
        line_mass(last, key, scale=1.0, window=0)


def test_operators_are_well_formed_and_multiply_nothing_but_for_the_mass(native_twin):
    last, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 9, 8)
    torch.library.opcheck(torch.ops.paucity.line_mass, (last, key, 0.5, None, 3))
    assert flops(lambda: line_mass(last, key, scale=0.5)) == 2 * 4 * 5 * 9 * 8
    vertical, slash = masks(50)
    torch.library.opcheck(torch.ops.paucity.line_counts, (vertical, slash, 31, 16))
    counts = op.line_counts(vertical, slash, 31, 16)
    torch.library.opcheck(torch.ops.paucity.line_positions, (vertical, slash, counts, 31, 16, int(counts.max())))
    assert flops(lambda: line_lists(vertical, slash, num_queries=31, q_block=16)) == 0


def test_bad_input():
    vertical, slash = masks(9)
    with pytest.raises(InputError, match=r"slash must have shape \[2, 3, 9\], got \[2, 3, 8\]"):
        line_lists(vertical, slash[..., 1:], num_queries=9, q_block=4)
    with pytest.raises(InputTypeError, match="vertical must be bool"):
        line_lists(vertical.int(), slash, num_queries=9, q_block=4)
    with pytest.raises(InputError, match="num_queries must be"):
        line_lists(vertical, slash, num_queries=10, q_block=4)
    with pytest.raises(InputError, match="q_block must be"):
        line_lists(vertical, slash, num_queries=9, q_block=0)
