"""The choice of flexprefill, by loops."""

import math

import pytest
import torch
from pydantic import ValidationError

from paucity.attention.flexprefill import FlexPrefill, diagonal_mass, line_blocks, root_divergence
from paucity.attention.prompt import Prompt


def inputs(tq, tk, batch=2):
    generator = torch.Generator().manual_seed(tk)
    return torch.randn(batch, 4, tq, 8, generator=generator), torch.randn(batch, 2, tk, 8, generator=generator)


def softmax(logits):
    top = max(logits)
    exp = [math.exp(x - top) for x in logits]
    return [x / sum(exp) for x in exp]


def fewest(mass, share, forced, least=0):
    """Indices that are kept: forced ones first, then by mass, until the share is held and there are enough."""
    chosen, total = set(forced), sum(mass)
    for j in sorted(set(range(len(mass))) - chosen, key=lambda j: (-mass[j], j)):
        if sum(mass[i] for i in chosen) >= share * total and len(chosen) >= least:
            break
        chosen.add(j)
    return chosen


def naive(query, key, policy, window=None):
    """Kept pairs of blocks of one head, whether it is query-aware, for query ``[Tq, D]`` and key ``[Tk, D]``."""
    (tq, _), tk, size, scale = query.shape, len(key), policy.q_block, 0.3
    blocks, start = math.ceil(tk / size), tk - tq
    visible = {
        (i // size, j // size) for i in range(start, tk) for j in range(i + 1) if window is None or j > i - window
    }
    column, diagonal = [0.0] * blocks, [0.0] * blocks
    sample = range(max(start, tk - size), tk)
    for i in sample:
        seen = [j for j in range(i + 1) if window is None or j > i - window]
        prob = softmax([float(query[i - start] @ key[j]) * scale for j in seen])
        for j, p in zip(seen, prob, strict=True):
            column[j // size] += p / len(sample)
            near, away = divmod(i - j, size)
            diagonal[near] += p / len(sample) * (size - away) / size
            if near + 1 < blocks:
                diagonal[near + 1] += p / len(sample) * away / size
    mean = [key[j * size : (j + 1) * size].mean(0) for j in range(blocks)]
    low = 0 if window is None else max(0, sample[0] - window + 1) // size
    average = query[[i - start for i in sample]].mean(0)
    guess = [0.0] * low + softmax([float(average @ mean[j]) * scale for j in range(low, blocks)])
    divergence = 0.0
    for p, q in zip(guess, column, strict=True):
        for x in (p, q):
            divergence += x * math.log(x / ((p + q) / 2)) / 2 if x else 0.0
    aware = math.sqrt(divergence) < policy.tau
    least = min(blocks, math.ceil(policy.min_budget / size))
    columns, diagonals = (fewest(m, 0 if aware else policy.gamma, {0}, least) for m in (column, diagonal))
    kept = {(i, j) for i, j in visible if j in columns or i - j in diagonals}
    if aware:
        cells, mass = [], []
        for i in range(start // size, blocks):
            mine = [x for x in range(i * size, (i + 1) * size) if start <= x < tk]
            seen = [j for j in range(i + 1) if (i, j) in visible]
            average = query[[x - start for x in mine]].mean(0)
            cells += [(i, j) for j in seen]
            mass += softmax([float(average @ mean[j]) * scale for j in seen])
        kept |= {cells[c] for c in fewest(mass, policy.gamma, set())}
    return kept, aware


@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (63, 63), (66, 66), (31, 50), (3, 40)])
@pytest.mark.parametrize("tau", [0.0, 0.09, 1.0])
@pytest.mark.parametrize("window", [None, 19])
def test_matches_naive(tq, tk, tau, window):
    query, key = inputs(tq, tk)
    policy = FlexPrefill(q_block=8, gamma=0.6, tau=tau, min_budget=9)
    mask = policy.select(query, key, Prompt(0, 0.3, window=window))
    first, patterns = (tk - tq) // 8, set()
    for b in range(2):
        for h in range(4):
            wanted, aware = naive(query[b, h], key[b, h // 2], policy, window)
            assert {(i + first, j) for i, j in mask.blocks[b, h].nonzero().tolist()} == wanted
            patterns.add(aware)
    if (tq, tau, window) == (63, 0.09, None):
        assert patterns == {True, False}


def test_a_diagonal_is_shared_by_the_block_diagonals_that_it_crosses():
    single = torch.zeros(13)
    single[6] = 1.0  # of blocks of 4: half of it two away, half of it one away
    torch.testing.assert_close(diagonal_mass(single, 4), torch.tensor([0.0, 0.5, 0.5, 0.0]))
    pairs = torch.zeros(4, 4)
    for i in range(6, 14):
        pairs[i // 4, (i - 6) // 4] += 1 / 8
    assert pairs[1, 0] + pairs[2, 1] + pairs[3, 2] == 0.5


def test_lines_hold_gamma_and_no_fewer_than_the_floor():
    generator = torch.Generator().manual_seed(0)
    column, diagonal = (torch.rand(2, 3, 20, generator=generator).softmax(-1) for _ in range(2))
    for gamma in (0.1, 0.5, 0.95):
        columns, diagonals = FlexPrefill(q_block=8, gamma=gamma, min_budget=24).lines(column, diagonal)
        for kept, mass in ((columns, column), (diagonals, diagonal)):
            assert kept[..., 0].all()
            assert (kept.sum(-1) >= 3).all()
            assert ((kept * mass).sum(-1) >= gamma - 1e-6).all()
    floor = FlexPrefill(q_block=8, min_budget=24).lines(column, diagonal, floor=True)
    assert all((kept.sum(-1) == 3).all() for kept in floor)
    assert (line_blocks(*floor, 20).sum(-1) <= 6).all()


def test_divergence_is_zero_for_equals_and_one_bit_for_strangers():
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    torch.testing.assert_close(root_divergence(p, p), torch.zeros(2))
    torch.testing.assert_close(root_divergence(p[:1], p[:1].flip(-1)), torch.tensor([math.log(2)]).sqrt())


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": 1.1}, {"tau": -0.1}, {"min_budget": 0}, {"k_block": 8}])
def test_bad_options(options):
    with pytest.raises(ValidationError):
        FlexPrefill(**options)
