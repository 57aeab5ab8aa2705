"""The choice of block_topk, by loops."""

import math

import pytest
import torch
from pydantic import ValidationError

from paucity.attention.block_topk import BlockTopK
from paucity.attention.prompt import Prompt
from paucity.kernels.attention import attention_recall


def inputs(tq, tk, batch=2):
    generator = torch.Generator().manual_seed(tk)
    return torch.randn(batch, 4, tq, 8, generator=generator), torch.randn(batch, 2, tk, 8, generator=generator)


def naive(query, key, policy, budget, *, window=None, first=False):
    """Kept blocks of one batch row and head, for query ``[Tq, D]`` and key ``[Tk, D]``."""
    tq, tk = len(query), len(key)
    rows = []
    for block in range((tk - tq) // policy.q_block, math.ceil(tk / policy.q_block)):
        mine = [i for i in range(block * policy.q_block, (block + 1) * policy.q_block) if tk - tq <= i < tk]
        mean = query[[i - tk + tq for i in mine]].mean(0)
        ranked = []
        for other in range(math.ceil(tk / policy.k_block)):
            theirs = range(other * policy.k_block, min(tk, (other + 1) * policy.k_block))
            if not any(j <= i and (window is None or j > i - window) for i in mine for j in theirs):
                continue
            own = any(i // policy.q_block == block for i in theirs)
            forced = own or (first and other == 0)
            ranked.append((not forced, -float(mean @ key[list(theirs)].mean(0)), other))
        rows.append({other for _, _, other in sorted(ranked)[:budget]})
    return rows


@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (63, 63), (130, 130), (31, 50), (3, 40)])
@pytest.mark.parametrize(("q_block", "k_block", "num_blocks"), [(8, 8, 3), (8, 4, 4), (4, 8, 2), (6, 4, 3)])
@pytest.mark.parametrize(("window", "first"), [(None, False), (11, False), (None, True)])
def test_matches_naive(tq, tk, q_block, k_block, num_blocks, window, first):
    query, key = inputs(tq, tk)
    policy = BlockTopK(q_block=q_block, k_block=k_block, num_blocks=num_blocks + first, force_first=first)
    mask = policy.select(query, key, Prompt(0, 0.3, window=window))
    for b in range(2):
        for h in range(4):
            wanted = naive(query[b, h], key[b, h // 2], policy, num_blocks + first, window=window, first=first)
            assert [set(row.nonzero().flatten().tolist()) for row in mask.blocks[b, h]] == wanted


def test_every_row_keeps_exactly_its_budget():
    query, key = inputs(300, 300)
    mask = BlockTopK(q_block=16, k_block=16, num_blocks=5).select(query, key, Prompt(0, 0.3))
    assert (mask.kv_num_blocks == torch.arange(1, 20).clamp(max=5)).all()
    assert mask.blocks.diagonal(dim1=-2, dim2=-1).all()
    share = BlockTopK(q_block=16, k_block=16, block_share=0.5).select(query, key, Prompt(0, 0.3))
    assert (share.kv_num_blocks == torch.arange(1, 20).clamp(max=9)).all()


def test_budgets_and_lookahead():
    assert BlockTopK().budget(6336) == 99
    assert BlockTopK().budget(100_000) == 100
    assert BlockTopK(block_share=0.25).budget(6400) == 25
    assert BlockTopK(block_share=0.001, q_block=128, force_first=True).budget(6400) == 3
    assert BlockTopK(q_block=48, k_block=64).lookahead(1000) == 192


def test_a_dropped_start_is_not_forced():
    query, key = inputs(64, 64)
    policy = BlockTopK(q_block=8, k_block=8, num_blocks=2, force_first=True)
    assert policy.select(query, key, Prompt(0, 0.3)).blocks[..., 0].all()
    assert not policy.select(query, key, Prompt(0, 0.3, dropped=8)).blocks[..., 0].all()


@pytest.mark.parametrize("options", [{"num_blocks": 0}, {"block_share": 0.0}, {"block_share": 1.5}, {"k_block": 0}])
def test_bad_options(options):
    with pytest.raises(ValidationError):
        BlockTopK(**options)


def test_a_budget_below_what_is_forced_is_refused():
    with pytest.raises(ValidationError, match="num_blocks must be at least 3, the blocks that always stay, got 2"):
        BlockTopK(num_blocks=2, q_block=128, force_first=True)


def test_blocks_longer_than_the_text_are_the_text():
    query, key, prompt = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), Prompt(scale=0.5)
    done = BlockTopK(q_block=1 << 40, k_block=1 << 40, num_blocks=1).attend(query[:, :, 17:], key, key, prompt)
    assert int(done.kept.flatten()[0]) == sum(range(18, 41))
    pattern = BlockTopK(q_block=1 << 40, k_block=1 << 40, num_blocks=1).select(query, key, prompt)
    torch.testing.assert_close(attention_recall(query, key, pattern), torch.ones(1, 4))
