"""DSnoT against Algorithm 1 by loops over rows."""

import pytest
import torch
from pydantic import ValidationError

from paucity.checks import InputError
from paucity.ops.select import nm_mask, topk_mask
from paucity.weights.dsnot import DSnoT, dsnot_mask


def naive(weight, mask, mean, variance, norm, cycles, threshold, m=None):
    mask = mask.clone()
    for r in range(len(weight)):
        effect = [(w * e).item() for w, e in zip(weight[r], mean, strict=True)]
        worth = [(w * e / v).item() for w, e, v in zip(weight[r], mean, variance, strict=True)]
        cost = [(w.abs() * x).item() for w, x in zip(weight[r], norm, strict=True)]
        pruned = [j for j in range(len(effect)) if not mask[r, j]]
        kept = [j for j in range(len(effect)) if mask[r, j]]
        error = sum(effect[j] for j in pruned)
        first = error > 0
        for _ in range(cycles):
            if abs(error) <= threshold:
                break
            sign = 1 if error > 0 else -1
            back = [j for j in pruned if sign * effect[j] > 0]
            if not back:
                break
            j = max(back, key=lambda c: sign * worth[c])
            out = [c for c in kept if (sign * effect[c] < 0 if m is None else c // m == j // m)]
            if not out:
                break
            c = min(out, key=lambda c: cost[c])
            after = error + effect[c] - effect[j]
            pruned.remove(j)
            kept.remove(c)
            if m is not None and (after > 0) != first:
                break
            mask[r, j], mask[r, c], error = True, False, after
    return mask


def draw(rows, cols):
    inputs = torch.randn(50, cols) + torch.randn(cols)
    return torch.randn(rows, cols), inputs.mean(0), inputs.var(0), inputs.norm(dim=0)


@pytest.mark.parametrize(("rows", "cols"), [(1, 2), (9, 30), (4, 101)])
def test_matches_naive(rows, cols):
    weight, mean, variance, norm = draw(rows, cols)
    mask = topk_mask(weight.abs() * norm, sparsity=0.6)
    found = dsnot_mask(weight, mask, mean, variance, norm, max_cycles=20, threshold=0.05)
    assert torch.equal(found, naive(weight, mask, mean, variance, norm, 20, 0.05))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 5)])
def test_groups_match_naive_and_stay_groups(n, m):
    weight, mean, variance, norm = draw(11, 40)
    mask = nm_mask(weight.abs() * norm, n=n, m=m)
    found = dsnot_mask(weight, mask, mean, variance, norm, max_cycles=20, threshold=0.05, m=m)
    assert torch.equal(found, naive(weight, mask, mean, variance, norm, 20, 0.05, m))
    assert (found.view(11, -1, m).sum(-1) == n).all()


def test_error_falls_and_counts_stay(monkeypatch):
    weight, mean, variance, norm = draw(64, 96)
    mask = topk_mask(weight.abs() * norm, sparsity=0.7)
    found = dsnot_mask(weight, mask, mean, variance, norm)
    assert torch.equal(found.sum(1), mask.sum(1))
    before, after = ((weight * mean * ~kept).sum(1).abs() for kept in (mask, found))
    assert after.mean() < 0.2 * before.mean()
    assert torch.equal(dsnot_mask(weight, mask, mean, variance, norm, max_cycles=0), mask)
    monkeypatch.setattr("paucity.weights.dsnot._CHUNK", 96 * 7)
    assert torch.equal(dsnot_mask(weight, mask, mean, variance, norm), found)


def test_bad_input():
    weight, mean, variance, norm = draw(3, 8)
    with pytest.raises(InputError, match=r"mean must have shape \[8\], got \[7\]"):
        dsnot_mask(weight, torch.ones(3, 8, dtype=torch.bool), mean[:7], variance, norm)
    with pytest.raises(ValidationError, match="block must be left out with dsnot"):
        DSnoT(block=(1, 4))
