"""The choice of anchor, by loops."""

import math

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import Anchor, Prompt
from paucity.attention.anchor import row_anchors


def inputs(tq, tk, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, tq, 8, generator=generator), torch.randn(2, 2, tk, 8, generator=generator)


def naive(query, key, prompt, block, step, theta):
    """Algorithms 1 and 2: which keys each query sees, and the anchors."""
    (batch, heads, tq, _), tk = query.shape, key.shape[2]
    before, window = tk - tq, prompt.window or tk
    seen = torch.zeros(batch, heads, tq, tk, dtype=torch.bool)
    anchors = torch.zeros(batch, heads, tq)

    def capped(x):
        x = float(x) * prompt.scale
        return math.tanh(x / prompt.softcap) * prompt.softcap if prompt.softcap else x

    for b in range(batch):
        for h in range(heads):
            k = key[b, h // 2]
            for i in range(before, tk):
                low = max(0, i // (block * step) * block * step - block)
                around = [j for j in range(i + 1) if (j < block or j >= low) and j > i - window]
                anchors[b, h, i - before] = max(capped(query[b, h, i - before] @ k[j]) for j in around)
            for group in range(before // (block * step), -(-tk // (block * step))):
                start = group * block * step
                low, stripes = max(0, start - block), set()
                for first in range(start, min(start + block * step, tk), block):
                    rows = [i - before for i in range(first, first + block) if before <= i < tk]
                    if not rows:
                        continue
                    mean, anchor = query[b, h, rows].mean(0), anchors[b, h, rows].mean()
                    oldest = rows[0] + before - window
                    stripes |= {j for j in range(block, low) if j > oldest and capped(mean @ k[j]) + theta >= anchor}
                for i in range(max(start, before), min(start + block * step, tk)):
                    for j in range(i + 1):
                        seen[b, h, i - before, j] = (j < block or j >= low or j in stripes) and j > i - window
    return seen, anchors


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (37, 37), (10, 45), (24, 48)])
@pytest.mark.parametrize(
    ("block", "step", "theta", "options"),
    [(4, 2, 2.0, {}), (3, 1, 1.0, {"softcap": 1.5}), (2, 3, 1.5, {"window": 17}), (5, 4, 50.0, {})],
)
def test_the_paper_by_loops(tq, tk, block, step, theta, options, seed):
    query, key = inputs(tq, tk, seed)
    prompt = Prompt(scale=0.5, **options)
    seen, anchors = naive(query, key, prompt, block, step, theta)
    torch.testing.assert_close(row_anchors(query, key, prompt, block, step).squeeze(-1), anchors)
    policy = Anchor(q_block=block, step=step, theta=theta)
    pattern = policy.select(query, key, prompt)
    lead = (tk - tq) % pattern.q_block
    found = pattern.visible(tq + lead, tk, window=prompt.window)[:, :, lead:]
    assert torch.equal(found, seen)
    done = policy.attend(query, key, key, prompt)
    assert torch.equal(done.kept, seen.sum((2, 3)))


def test_theta_is_a_dial():
    query, key = inputs(60, 60)
    kept = [
        Anchor(q_block=4, step=2, theta=theta).select(query, key, Prompt(scale=1.0)).kept_pairs(60, 60)
        for theta in (-100.0, 3.0, 5.0, 100.0)
    ]
    assert (kept[0] < kept[1]).all()
    assert (kept[1] < kept[2]).all()
    assert (kept[2] < kept[3]).all()
    assert (kept[3] == 60 * 61 // 2).all()


@pytest.mark.parametrize("options", [{"step": 0}, {"q_block": 0}, {"theta": float("inf")}, {"block": 128}])
def test_bad_options(options):
    with pytest.raises(ValidationError):
        Anchor(**options)
