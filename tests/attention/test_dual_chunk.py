"""Dual-chunk attention by loops: positions written down as in the paper, queries and keys never turned before."""

import json
import math

import pytest
import torch
from pydantic import ValidationError

from paucity.attention.apply import apply
from paucity.attention.compute import attend_exactly
from paucity.attention.dual_chunk import DualChunk
from paucity.attention.portable import from_json, to_json
from paucity.attention.prompt import Prompt
from paucity.attention.refine import RefinedBudgets
from paucity.attention.rotary import Rotary
from paucity.attention.vertical_slash import VerticalSlash
from paucity.checks import InputError

FREQ = torch.tensor([1.0, 0.3, 0.05])  # of 8 dimensions the first 6 are turned
PROMPT = Prompt(layer=0, scale=0.6, rotary=Rotary(FREQ))


def position_pair(i, j, chunk_size, local_size):
    """Query and key position, Sec. 3.2 to 3.4 of 2402.17463."""
    s = chunk_size - local_size
    apart = i // s - j // s
    if apart == 0:
        return i % s, j % s
    if apart == 1:
        return min(s + i % s, chunk_size - 1), j % s
    return chunk_size - 1, j % s


def embedded(x, position):
    """A single vector turned to a position, pair by pair."""
    x = x.clone()
    for pair, freq in enumerate(FREQ.tolist()):
        a, b, angle = x[pair].item(), x[pair + 3].item(), position * freq
        x[pair], x[pair + 3] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return x


def inputs(tq, tk, seed=0, heads=2, groups=1):
    """Queries and keys without positions, values, and the first two as a model would give them."""
    draw = torch.Generator().manual_seed(seed)
    bare_q, bare_k, v = (torch.randn(1, h, t, 8, generator=draw) for h, t in ((heads, tq), (groups, tk), (groups, tk)))
    q = PROMPT.rotary.turn(bare_q, torch.zeros(tq).long(), torch.arange(tk - tq, tk))
    k = PROMPT.rotary.turn(bare_k, torch.zeros(tk).long(), torch.arange(tk))
    return bare_q, bare_k, v, q, k


def naive(bare_q, bare_k, v, chunk_size, local_size, scale, seen):
    (_, heads, tq, _), tk = bare_q.shape, bare_k.shape[2]
    out = torch.zeros_like(bare_q)
    for h in range(heads):
        for r in range(tq):
            i, logits, group = r + tk - tq, [], h * bare_k.shape[1] // heads
            for j in range(tk):
                a, b = position_pair(i, j, chunk_size, local_size) if j <= i else (0, 0)
                logit = float(embedded(bare_q[0, h, r], a) @ embedded(bare_k[0, group, j], b)) * scale
                logits.append(logit if seen(h, i, j) else -math.inf)
            out[0, h, r] = torch.tensor(logits).softmax(-1) @ v[0, group]
    return out


def test_turned_vectors_are_those_of_the_other_position():
    x, zero = torch.randn(8, generator=torch.Generator().manual_seed(0)), torch.zeros(1).long()
    turned = PROMPT.rotary.turn(x[None], zero, zero + 7)
    torch.testing.assert_close(turned[0], embedded(x, 7))
    torch.testing.assert_close(PROMPT.rotary.turn(turned, zero + 7, zero + 3)[0], embedded(x, 3))


@pytest.mark.parametrize(("tq", "tk"), [(37, 37), (9, 41), (1, 30)])
@pytest.mark.parametrize(("chunk_size", "local_size"), [(8, 2), (11, 5), (10, 1), (8, 4)])
@pytest.mark.parametrize("window", [None, 17])
def test_all_keys_at_the_positions_of_the_paper(tq, tk, chunk_size, local_size, window):
    bare_q, bare_k, v, q, k = inputs(tq, tk, seed=tq)
    policy = DualChunk(chunk_size=chunk_size, local_size=local_size, original_length=20, sparse=None)
    done = policy.attend(q, k, v, Prompt(scale=0.6, rotary=PROMPT.rotary, window=window))
    scale = 0.6 * max(1.0, 0.1 * math.log(tk / 20) + 1) ** 2

    def seen(h, i, j):
        return j <= i and (window is None or j > i - window)

    torch.testing.assert_close(done.out, naive(bare_q, bare_k, v, chunk_size, local_size, scale, seen))
    assert done.kept.unique().tolist() == [sum(seen(0, i, j) for i in range(tk - tq, tk) for j in range(tk))]


def test_keys_that_a_cropped_cache_lost_move_no_position():
    _, _, v, q, k = inputs(9, 41)
    policy, whole = DualChunk(chunk_size=8, local_size=3, sparse=None), Prompt(window=13, rotary=PROMPT.rotary)
    cropped = Prompt(window=13, rotary=PROMPT.rotary, dropped=17)
    out = policy.attend(q, k[:, :, 17:], v[:, :, 17:], cropped).out
    torch.testing.assert_close(out, policy.attend(q, k, v, whole).out)


@pytest.mark.parametrize("length", [1, 9, 24])
def test_up_to_the_chunk_size_it_is_dense(length):
    _, _, v, q, k = inputs(length, length)
    policy = DualChunk(chunk_size=24, local_size=8, sparse=None)
    assert torch.equal(policy.attend(q, k, v, PROMPT).out, attend_exactly(q, k, v, PROMPT).out)
    away = DualChunk(chunk_size=23, local_size=8, sparse=None).attend_chunks(  # as far as that they are the same
        *(q, k, v), policy.select(q, k, PROMPT), PROMPT
    )[0]
    torch.testing.assert_close(away[:, :, :23], attend_exactly(q, k, v, PROMPT).out[:, :, :23])


SPARSE = VerticalSlash(num_vertical=4, num_slash=3, num_last_queries=3, forced_vertical=1, forced_slash=1, min_length=0)


def chosen(bare_q, bare_k, end, first, chunk_size, local_size, verticals, slashes):
    """Columns and distances kept by the last three queries before ``end``, at continuous positions."""
    s, last = chunk_size - local_size, end - 1
    column, slash = torch.zeros(end), torch.zeros(end)
    for i in range(max(first, end - 3), end):
        logits = []
        for j in range(i + 1):
            near = last // s - j // s < 2
            # Far keys: the last query's chunk is put after c positions, whichever chunk the key is in.
            a = i if near else chunk_size + i - last // s * s
            logits.append(float(embedded(bare_q[0, 0, i - first], a) @ embedded(bare_k[0, 0, j], j if near else j % s)))
        prob = (torch.tensor(logits) * 0.6).softmax(-1)
        column[: i + 1] += prob
        slash[: i + 1] += prob.flip(0)
    column[:1], slash[:1] = math.inf, math.inf
    return set(column.topk(verticals).indices.tolist()), set(slash.topk(slashes).indices.tolist())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("tq", "tk", "prefill_chunk", "factors"),
    [(39, 39, 40, None), (39, 39, 12, [[1.0, 2.0]]), (14, 43, 12, None)],
)
def test_chosen_keys_at_the_positions_of_the_paper(seed, tq, tk, prefill_chunk, factors):
    c, w, q_block, first = 13, 4, 4, tk - tq
    bare_q, bare_k, v, q, k = inputs(tq, tk, seed=seed)
    policy = DualChunk(
        chunk_size=c, local_size=w, prefill_chunk=prefill_chunk, q_block=q_block, sparse=SPARSE, budget_factors=factors
    )
    kept = torch.zeros(2, tk, tk, dtype=torch.bool)
    for h in range(2):
        grow = 1 if factors is None else int(factors[0][h])
        for i in range(first, tk):
            end = min(tk, (i // prefill_chunk + 1) * prefill_chunk)
            begin = max(first, end - 1 - (end - 1) % prefill_chunk)
            columns, slashes = chosen(
                bare_q[:, h : h + 1, begin - first :], bare_k, end, begin, c, w, 4 * grow, 3 * grow
            )
            start = i // q_block * q_block
            for j in range(i + 1):
                kept[h, i, j] = j in columns or any(start - d <= j < start - d + q_block for d in slashes)
    done = policy.attend(q, k, v, PROMPT)
    torch.testing.assert_close(done.out, naive(bare_q, bare_k, v, c, w, 0.6, lambda h, i, j: bool(kept[h, i, j])))
    assert done.kept[0].tolist() == kept[:, first:].sum((1, 2)).tolist()


def test_decode_steps_read_all_keys_and_short_texts_are_not_thinned():
    _, _, v, q, k = inputs(1, 30)
    dense, sparse = (DualChunk(chunk_size=8, local_size=2, sparse=which) for which in (None, SPARSE))
    assert sparse.decodes
    assert torch.equal(sparse.attend(q, k, v, PROMPT).out, dense.attend(q, k, v, PROMPT).out)
    _, _, v, q, k = inputs(30, 30)
    later = DualChunk(chunk_size=8, local_size=2, sparse=SPARSE.model_copy(update={"min_length": 31}))
    assert torch.equal(later.attend(q, k, v, PROMPT).out, dense.attend(q, k, v, PROMPT).out)


def test_gradients_and_half_precision():
    _, _, v, q, k = inputs(20, 26)
    policy = DualChunk(chunk_size=8, local_size=3, sparse=SPARSE, q_block=4, prefill_chunk=8)
    given = [x.double().requires_grad_() for x in (q, k, v)]
    out = policy.attend(*given, PROMPT).out
    out.square().sum().backward()
    nudge = torch.zeros_like(given[1]).index_fill_(2, torch.tensor([5]), 1e-6)
    moved = policy.attend(given[0], given[1] + nudge, given[2], PROMPT).out.square().sum() - out.square().sum()
    assert float(moved.detach()) / 1e-6 == pytest.approx(float(given[1].grad[0, :, 5].sum()), rel=1e-3)
    half = policy.attend(*(x.bfloat16() for x in (q, k, v)), PROMPT).out
    assert half.dtype == torch.bfloat16
    dense = DualChunk(chunk_size=8, local_size=3, sparse=None)
    torch.testing.assert_close(
        dense.attend(*(x.bfloat16() for x in (q, k, v)), PROMPT).out.float(),
        dense.attend(q, k, v, PROMPT).out,
        atol=5e-2,
        rtol=5e-2,
    )


@pytest.mark.parametrize("threshold", [0.8, 0.95])
def test_refined_budgets_recover_what_is_asked_for(threshold):
    _, _, _, q, k = inputs(31, 31, heads=4, groups=2)
    base = DualChunk(chunk_size=13, local_size=4, prefill_chunk=8, q_block=4, sparse=SPARSE)
    factors = RefinedBudgets(base=base, threshold=threshold).refined(q, k, PROMPT, [1.0] * 4)
    logits = torch.full((4, 31, 31), -math.inf)
    for i in range(31):
        pairs = torch.tensor([position_pair(i, j, 13, 4) for j in range(i + 1)])
        mine = PROMPT.rotary.turn(q[0, :, i, None].expand(-1, i + 1, -1), torch.full((i + 1,), i), pairs[:, 0])
        theirs = PROMPT.rotary.turn(k[0, :, : i + 1], torch.arange(i + 1), pairs[:, 1]).repeat_interleave(2, 0)
        logits[:, i, : i + 1] = 0.6 * (mine * theirs).sum(-1)

    def recall(factors):  # by the masks, and all logits at once
        policy = base.model_copy(update={"budget_factors": [factors]})
        kept = policy.select(q, k, PROMPT).visible(31, 31)[0]
        return (logits.softmax(-1) * kept).sum(-1).mean(-1)

    grown = torch.tensor(factors) > 1
    assert grown.any()
    assert (recall(factors) >= threshold).all()
    assert (recall([f / 2 for f in factors])[grown] < threshold).all()  # one step less would not do


def test_refined_budgets_of_a_model(tiny_model):
    model = tiny_model("llama")
    ids = torch.randint(64, (1, 60), generator=torch.Generator().manual_seed(0))
    sparse = VerticalSlash(num_vertical=2, num_slash=2, forced_vertical=1, forced_slash=1, min_length=0)
    base = DualChunk(chunk_size=24, local_size=6, prefill_chunk=32, q_block=4, sparse=sparse, min_length=0)
    fitted = RefinedBudgets(base=base, threshold=0.7).fit(model, [ids, ids[:, :40]])
    assert [len(row) for row in fitted.budget_factors] == [4, 4]
    assert max(map(max, fitted.budget_factors)) > 1
    density = {}
    for name, policy in (("base", base), ("fitted", fitted)):
        applied = apply(model, policy)
        model(input_ids=ids)
        density[name] = applied.head_density()
        applied.remove()
    more = torch.tensor(fitted.budget_factors) > 1
    assert ((density["fitted"] > density["base"]) == more).all()
    only = RefinedBudgets(base=base.model_copy(update={"layers": [1]}), threshold=0.7).fit(model, [ids])
    assert only.budget_factors[0] == [1.0] * 4
    with pytest.raises(InputError, match="calibration must hold at least one batch"):
        RefinedBudgets(base=base).fit(model, [])
    with pytest.raises(InputError, match=r"calibration must have 2 dimensions, got shape \[60\]"):
        RefinedBudgets(base=base).fit(model, [ids[0]])
    with pytest.raises(ValidationError, match="base must have sparse selection"):
        RefinedBudgets(base=DualChunk(sparse=None))


def test_steps_on_a_cache_equal_one_prompt_and_positions_change_beyond_the_chunk(tiny_model):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 9  # sharper, so that positions matter
    ids = torch.randint(64, (1, 50), generator=torch.Generator().manual_seed(1))
    applied = apply(model, DualChunk(chunk_size=16, local_size=4, sparse=None, min_length=0))
    whole = model(input_ids=ids).logits
    out = model(input_ids=ids[:, :44], use_cache=True)
    steps, cache = [out.logits], out.past_key_values
    for at in range(44, 50):
        steps.append(model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-3, rtol=1e-3)
    applied.remove()
    dense = model(input_ids=ids).logits
    torch.testing.assert_close(whole[:, :16], dense[:, :16], atol=1e-3, rtol=1e-3)
    assert (whole[:, 17:] - dense[:, 17:]).abs().max() > 1e-2


def test_a_model_without_rotary_embedding_is_refused_where_it_matters():
    _, _, v, q, k = inputs(30, 30)
    policy = DualChunk(chunk_size=8, local_size=2, sparse=None)
    with pytest.raises(InputError, match="dual_chunk: model must have a rotary embedding of a kind known"):
        policy.attend(q, k, v, Prompt())
    assert policy.attend(q[:, :, :8], k[:, :, :8], v[:, :, :8], Prompt()).out.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 8, "local_size": 5},
        {"local_size": 0},
        {"prefill_chunk": 100},
        {"budget_factors": [[0.0]]},
        {"sparse": None, "budget_factors": [[1.0]]},
        {"sparse": {"num_vertical": 0}},
        {"original_length": 0},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValidationError):
        DualChunk(**options)


def test_options_are_json():
    policy = DualChunk(sparse=VerticalSlash(num_vertical=7), budget_factors=[[1.0, 2.0]])
    assert from_json(json.loads(json.dumps(to_json(policy)))) == policy
    assert from_json(json.loads(json.dumps(to_json(DualChunk(sparse=None))))).sparse is None
    policy.check_model([0], 2, 1)
    with pytest.raises(InputError, match="budget_factors must have 2 layers of 2 heads"):
        policy.check_model([0, 1], 2, 1)
