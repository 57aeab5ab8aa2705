"""The choice of grid by loops, on video-like queries and keys whose lines are known, and its options."""

import math

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import Grid, Prompt, SinkWindow, VerticalSlash
from paucity.attention.compute import attend_exactly
from paucity.kernels.attention import attention_recall


def inputs(tq, tk, seed=0, heads=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, t, 8, generator=generator) * 2 for h, t in ((heads, tq), (2, tk), (2, tk))]


def naive(policy, query, key, dropped=0):
    """Which keys each query of one row and head sees, by the words of the docstring."""
    tq, tk, block = len(query), len(key), policy.q_block
    first, text = tk - tq, range(dropped, dropped + tk)
    spans = [[0, 10**6]] if policy.spans is None else policy.spans
    number, count = {}, 0
    for i in range(dropped + tk):
        if any(start <= i < stop for start, stop in spans):
            number[i] = count
            count += 1
    visual = [i in number for i in text]
    order = [number.get(i) for i in text]
    sinks = [i < policy.num_sinks for i in text]
    low = [max(0, i // block * block - policy.window_size + 1) for i in range(tk)]
    wanted = policy.num_vertical if policy.vertical_share is None else tk - round((1 - policy.vertical_share) * tk)
    keeps = {}
    for kind in (False, True):
        rows = [i for i in range(first, tk) if policy.boundary == "none" or visual[i] == kind]
        if policy.boundary == "none" and not kind:
            continue
        mass, slashes = [0.0] * tk, {}
        for i in rows[-policy.num_last_queries :]:
            prob = torch.softmax(key[: i + 1] @ query[i - first], 0).tolist()
            for j in range(i + 1):
                if j < low[i] and not sinks[j]:
                    mass[j] += prob[j]
                    if visual[i] and visual[j]:
                        slashes[i, j] = prob[j]
        best, lines, slash = -math.inf, set(), None
        if kind and rows:
            total = sum(mass[j] for j in range(tk) if visual[j])
            for stride in sorted(policy.strides):
                n = policy.num_phases if policy.line_share is None else int(policy.line_share * stride)
                gain, mine, far = 0.0, set(), None
                if policy.vertical:
                    by = [
                        sum(mass[j] for j in range(tk) if visual[j] and order[j] % stride == p) for p in range(stride)
                    ]
                    kept = sorted(range(stride), key=lambda p: (-by[p], p))[:n]
                    gain += sum(by[p] for p in kept) - n / stride * total
                    mine = {j for j in range(tk) if visual[j] and order[j] % stride in kept}
                if policy.slash:
                    by = [0.0] * stride
                    for (i, j), prob in slashes.items():
                        by[(order[i] - order[j]) % stride] += prob
                    far = sorted(range(stride), key=lambda p: (-by[p], p))[:n]
                    gain += sum(by[p] for p in far) - n / stride * sum(by)
                if gain > best + 1e-6 * total:
                    best, lines, slash = gain, mine, (stride, far)
        groups = [True, False] if policy.boundary == "both" else [None]
        single = set()
        for group in groups:
            free = [
                j for j in range(tk) if not sinks[j] and (not kind or j not in lines) and group in (None, visual[j])
            ]
            single |= set(sorted(free, key=lambda j: (-mass[j], j))[:wanted])
        keeps[kind] = (single if rows else set()) | lines | ({j for j in range(tk) if sinks[j]} if rows else set())
        if kind:
            keeps["slash"] = slash
    seen = torch.zeros(tq, tk, dtype=torch.bool)
    for i in range(first, tk):
        start = i // block * block
        mates = range(max(start, first), min(start + block, tk))
        kept = set(range(low[i], i + 1))
        for kind in {True} if policy.boundary == "none" else {visual[x] for x in mates}:
            kept |= keeps[kind]
        if policy.slash and keeps["slash"] is not None:
            stride, far = keeps["slash"]
            members = [x for x in range(start, min(start + block, tk)) if visual[x]]
            kept |= {j for j in range(tk) if visual[j] and any((order[x] - order[j]) % stride in far for x in members)}
        for j in kept:
            seen[i - first, j] = j <= i
    return seen


OPTIONS = [
    {"strides": [5, 9], "num_vertical": 3},
    {"strides": [4, 10], "line_share": 0.25, "vertical_share": 0.1, "boundary": "query", "spans": [[4, 20], [23, 47]]},
    {"strides": [6], "num_vertical": 2, "boundary": "both", "spans": [[10, 33]]},
    {"strides": [9, 12], "num_vertical": 0, "slash": True, "spans": [[2, 44]]},
    {"strides": [11, 13], "num_vertical": 1, "slash": True, "vertical": False, "num_phases": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("tq", "tk", "dropped"), [(1, 1, 0), (50, 50, 0), (17, 41, 0), (30, 37, 6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_matches_naive(options, tq, tk, dropped, seed):
    policy = Grid(**options, num_sinks=2, window_size=4, num_last_queries=5, q_block=8)
    query, key, _ = inputs(tq, tk, seed)
    pattern = policy.select(query, key, Prompt(dropped=dropped))
    lead = (tk - tq) % 8
    found = pattern.visible(tq + lead, tk)[:, :, lead:]
    for row in range(2):
        for head in range(4):
            wanted = naive(policy, query[row, head], key[row, head // 2], dropped)
            assert torch.equal(found[row, head], wanted), (row, head)


@pytest.mark.parametrize("window", [None, 20])
def test_queries_on_horizontal_lines_see_everything(window):
    query, key, value = inputs(45, 60)
    prompt = Prompt(scale=0.5, window=window)
    plain = Grid(strides=[7], num_vertical=2, num_sinks=1, window_size=3, num_last_queries=4, q_block=8)
    lines = plain.model_copy(update={"horizontal": True})
    one, two = (policy.attend(query, key, value, prompt) for policy in (plain, lines))
    exact = attend_exactly(query, key, value, prompt).out
    on = plain._choose(query, key, prompt)[1]
    assert set(on.sum(-1).flatten().tolist()) <= {6, 7}
    torch.testing.assert_close(two.out[on], exact[on], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(two.out[~on], one.out[~on])
    seen = torch.arange(16, 61).clamp(max=window or 60)
    assert torch.equal(two.kept - one.kept, (on * seen).sum(-1))


def video(stride, phases, frames, seed=0):
    """Queries of a scene look at every ``stride``-th key, most at those of the same scene; scenes take turns.

    So the last queries, of one scene, say little about the keys of the others.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, len(phases), stride * frames, 32, generator=generator) for _ in range(2))
    scene = torch.arange(frames) // 10 % 4
    for head, phase in enumerate(phases):
        mark, *own = torch.nn.functional.normalize(torch.randn(5, 32, generator=generator), dim=-1)
        look = 3 * mark + 4 * torch.stack(own)[scene]
        key[0, head, phase::stride] += look
        query[0, head] += look.repeat_interleave(stride, 0)
    return 1.2 * query, key


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_recovers_stride_and_phase_and_keeps_more_than_other_methods_at_equal_cost(seed):
    phases, prompt = (3, 22, 11, 0), Prompt(scale=32**-0.5)
    query, key = video(24, phases, 80, seed)
    length, last = key.shape[2], {"num_last_queries": 8, "q_block": 32}
    policy = Grid(strides=[8, 16, 20, 24, 48], num_vertical=0, num_sinks=4, window_size=32, **last)
    pattern, lines = policy._choose(query, key, prompt)
    place = torch.arange(length)
    assert torch.equal(lines[0], torch.stack([place % 24 == phase for phase in phases]))
    pairs = pattern.kept_pairs(length, length).min()

    def recall(options, sizes):
        """Of the first of these sizes that costs as many pairs in every head."""
        for size in sizes:
            found = options(size).select(query, key, prompt)
            if (found.kept_pairs(length, length) >= pairs).all():
                return float(attention_recall(query, key, found, scale=prompt.scale).mean())
        raise AssertionError

    grid = recall(lambda _: policy, [0])
    window = recall(lambda size: SinkWindow(num_sinks=4, window_size=size), range(64, length, 4))
    slashes = {"num_slash": 32, "forced_slash": 32, "forced_vertical": 4}
    vertical = recall(lambda size: VerticalSlash(num_vertical=size, **slashes, **last), range(64, length, 4))
    assert grid > window + 0.3
    assert grid > vertical + 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"strides": []},
        {"strides": [0]},
        {"strides": [4], "num_phases": 5},
        {"strides": [4], "line_share": 0.2},
        {"strides": [64], "slash": True, "q_block": 64},
        {"strides": [4], "horizontal": True, "vertical": False},
        {"strides": [4], "spans": [[3, 3]]},
        {"strides": [4], "spans": [[5, 9], [2, 4]]},
        {"strides": [4], "window_size": 0},
        {"strides": [4], "boundary": "key"},
        {},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValidationError):
        Grid(**options)


def test_strides_longer_than_the_text_are_alike():
    query, key, _ = inputs(50, 50)
    options = {"q_block": 4, "window_size": 4, "num_sinks": 0, "num_vertical": 0, "slash": True, "num_phases": 3}
    short, long = (
        Grid(strides=[stride], line_share=None, **options).select(query, key, Prompt()).visible(50, 50)
        for stride in (51, 1 << 40)
    )
    assert torch.equal(short, long)


@pytest.mark.parametrize("slash", [False, True])
def test_a_block_longer_than_the_text_is_the_text(slash):
    query, key, _ = inputs(23, 50)
    options = {"strides": [1 << 41], "slash": slash, "num_phases": 3, "line_share": None}
    found, wanted = (
        Grid(q_block=size, **options).select(query, key, Prompt()).visible(23 + 27, 50) for size in (1 << 40, 64)
    )
    assert torch.equal(found, wanted)
