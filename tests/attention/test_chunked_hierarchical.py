"""The choice of chunked_hierarchical, by loops."""

import math

import pytest
import torch
from pydantic import ValidationError

from paucity.attention.chunked_hierarchical import ChunkedHierarchical
from paucity.attention.prompt import Prompt

SIZES = [(1, 1), (63, 63), (130, 130), (31, 50), (3, 40)]
VARYING = {"boundary_threshold": 0.6, "boundary_window": 2, "min_chunk": 3}


def inputs(tq, tk, batch=2):
    generator = torch.Generator().manual_seed(tk)
    return torch.randn(batch, 4, tq, 8, generator=generator), torch.randn(batch, 2, tk, 8, generator=generator)


def naive_chunks(key, policy):
    """First and last key plus one of each chunk, for key ``[H_kv, Tk, D]``."""
    tk, size, near, apart = key.shape[1], policy.q_block, policy.boundary_window, policy.min_chunk
    if policy.boundary_threshold is None:
        edges = list(range(0, tk, policy.k_block))
        return list(zip(edges, [*edges[1:], tk], strict=True))
    alike = {}
    for p in range(tk):
        if apart <= p % size <= size - apart and p <= tk - apart:
            left, right = (key[:, p + a : p + b].sum(1).flatten() for a, b in ((-near, 0), (0, near)))
            alike[p] = float(left @ right / left.norm() / right.norm())
    edges = [p for p in range(tk) if p % size == 0]
    for p, value in alike.items():
        rivals = [alike[r] for r in range(p - apart + 1, p + apart) if r in alike and r // size == p // size]
        if value == min(rivals) and value < policy.boundary_threshold:
            edges.append(p)
    edges.sort()
    return list(zip(edges, [*edges[1:], tk], strict=True))


def naive(query, key, chunks, policy, window=None, dropped=0):
    """Kept keys of each block of queries of one head, for query ``[Tq, D]`` and key ``[Tk, D]``."""
    tq, tk, size = len(query), len(key), policy.q_block
    start, budget, rows = tk - tq, policy.budget(tk), []
    for block in range(start // size, math.ceil(tk / size)):
        mine = [i for i in range(block * size, (block + 1) * size) if start <= i < tk]
        mean = query[[i - start for i in mine]].mean(0)
        oldest = 0 if window is None else mine[0] - window + 1
        ranked = []
        for low, high in chunks:
            seen = [j for j in range(low, high) if oldest <= j < (block + 1) * size]
            rank = 0 if high > block * size else 1 if low == 0 and not dropped else 2
            score = float(mean @ key[low:high].sum(0)) / math.sqrt(high - low)
            if seen:
                ranked.append((rank, -score if rank == 2 else 0, low, seen, range(low, high)))
        kept, whole = [], math.ceil(budget / policy.k_block)
        for number, (*_, seen, chunk) in enumerate(sorted(ranked)):
            if policy.boundary_threshold is not None:
                kept += seen[: budget - len(kept)]
            elif number < whole:
                kept += chunk
        rows.append(sorted(kept))
    return rows


def kept_keys(pattern, b, h, row):
    if hasattr(pattern, "positions"):
        found = pattern.positions[b, h, row]
        return found[found >= 0].tolist()
    keys = pattern.blocks[b, h, row].repeat_interleave(pattern.k_block)[: pattern.kv_len]
    return keys.nonzero().flatten().tolist()


@pytest.mark.parametrize(("tq", "tk"), SIZES)
@pytest.mark.parametrize("options", [{"k_block": 4}, {"k_block": 16, "num_keys": 40}, VARYING])
@pytest.mark.parametrize(("window", "dropped"), [(None, 0), (37, 0), (None, 5)])
def test_matches_naive(tq, tk, options, window, dropped):
    query, key = inputs(tq, tk)
    policy = ChunkedHierarchical(**{"q_block": 16, "density": 0.3, **options})
    pattern = policy.select(query, key, Prompt(0, 0.3, window=window, dropped=dropped))
    for b in range(2):
        chunks = naive_chunks(key[b], policy)
        for h in range(4):
            wanted = naive(query[b, h], key[b, h // 2], chunks, policy, window, dropped)
            assert [kept_keys(pattern, b, h, row) for row in range(len(wanted))] == wanted


@pytest.mark.parametrize("tk", [1, 15, 63, 130])
def test_chunks_cover_the_text_once(tk):
    policy = ChunkedHierarchical(q_block=16, boundary_threshold=1.0, boundary_window=2, min_chunk=3)
    key = inputs(tk, tk)[1]
    start, length, vector = policy.chunks(key)
    assert (length.sum(-1) == tk).all()
    assert (start[:, 1:] == start[:, :-1] + length[:, :-1]).all()
    assert all(low % 16 == 0 or size >= 3 for low, size in zip(start.flatten(), length.flatten(), strict=True) if size)
    assert len(set(length.flatten().tolist())) > 2 or tk < 63
    for b in range(2):
        for n, (low, size) in enumerate(zip(start[b], length[b], strict=True)):
            wanted = key[b, :, low : low + size].sum(1) / max(1, size) ** 0.5
            torch.testing.assert_close(vector[b, :, n], wanted, atol=1e-5, rtol=1e-5)


def test_every_row_keeps_exactly_its_budget():
    query, key = inputs(300, 300)
    for options, budget in ((VARYING, 75), ({"k_block": 8}, 80)):
        policy = ChunkedHierarchical(**{"q_block": 16, "density": 0.25, **options})
        pattern = policy.select(query, key, Prompt(0, 0.3))
        for row in range(19):
            assert len(kept_keys(pattern, 1, 2, row)) == min(budget, 16 * (row + 1), 300) - 4 * (
                row == 18 and budget == 80
            )


def test_a_change_of_content_is_a_boundary():
    one, other = torch.eye(8)[0], torch.eye(8)[1]
    text = torch.stack([one if j < 21 else other for j in range(32)])
    noise = 0.1 * torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    policy = ChunkedHierarchical(q_block=32, boundary_threshold=0.5, min_chunk=6)
    start, length, _ = policy.chunks((text + noise)[None, None])
    assert (start.tolist(), length.tolist()) == ([[0, 21]], [[21, 11]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density"),
        ({"boundary_threshold": 1.5}, "boundary_threshold"),
        ({"num_keys": 100}, r"num_keys must be at least q_block \(128\), got 100"),
        ({"k_block": 48}, r"q_block must be a multiple of k_block \(48\), got 128"),
        ({"boundary_threshold": 0.5, "boundary_window": 9}, r"boundary_window must be at most min_chunk \(8\), got 9"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValidationError, match=message):
        ChunkedHierarchical(**options)


@pytest.mark.parametrize("options", [{}, {"boundary_threshold": 0.5, "boundary_window": 2, "min_chunk": 4}])
def test_a_block_longer_than_the_text_takes_no_more_memory(options):
    query, key = inputs(23, 40)
    for size in (1 << 40, 64):
        pattern = ChunkedHierarchical(q_block=size, **options).select(query, key, Prompt(0, 0.3))
        lead = 17  # queries of the only block that are missing
        assert torch.equal(pattern.kept_pairs(23 + lead, 40), torch.full((2, 4), 40 * 41 // 2))
