"""Properties of every prefill policy on given queries, keys and values: one row per method in `table`."""

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from paucity.attention import Prompt, from_json, to_json
from paucity.attention.compute import attend_exactly
from paucity.checks import InputError
from paucity.kernels.attention import attention_recall

from .table import METHODS, ROWS, policy

methods = pytest.mark.parametrize("method", METHODS)
PROMPT = Prompt(layer=1, scale=0.5)


def inputs(tq, tk=None, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tk = tq if tk is None else tk
    return [torch.randn(batch, h, t, 8, generator=generator) for h, t in ((4, tq), (2, tk), (2, tk))]


@methods
@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (2, 2), (63, 63), (17, 40), (16, 48)])
def test_full_budget_is_dense(method, tq, tk):
    query, key, value = inputs(tq, tk)
    done = policy(method, "full").attend(query, key, value, PROMPT)
    seen = torch.ones(tq, tk, dtype=torch.bool).tril(tk - tq)
    exact = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(done.out, exact, atol=1e-5, rtol=1e-5)
    assert (done.kept == seen.sum()).all()


@pytest.mark.parametrize(
    "method",
    [
        *("anchor", "block_sparse", "flexprefill", "hierarchical", "power", "sharded", "sink_window"),
        *("spans", "tri_shape", "vertical_slash", "xattention"),
    ],
)
@pytest.mark.parametrize("tq", [23, 40])
def test_a_block_longer_than_the_text_takes_no_more_memory(method, tq):
    found, wanted = (policy(method, "full", q_block=size).attend(*inputs(tq, 40), PROMPT) for size in (1 << 40, 1 << 6))
    assert torch.equal(found.kept, wanted.kept)
    torch.testing.assert_close(found.out, wanted.out, atol=1e-6, rtol=1e-6)
    recall = attention_recall(*inputs(40)[:2], policy(method, "full", q_block=1 << 40).select(*inputs(40)[:2], PROMPT))
    torch.testing.assert_close(recall, torch.ones(2, 4))


@methods
@pytest.mark.parametrize("length", [40, 63])
def test_a_sparse_budget_computes_less_and_counts_it(method, length):
    query, key, value = inputs(length)
    done = policy(method, "sparse").attend(query, key, value, PROMPT)
    assert done.out.shape == query.shape
    assert done.out.isfinite().all()
    assert ROWS[method].exact or (done.kept < 0.95 * length * (length + 1) / 2).all()
    assert (done.kept >= length).all()
    for part in done.parts or ():
        counted = part.pattern.kept_pairs(length, length)
        wanted = done.kept if part.heads is None else done.kept[:, list(part.heads)]
        assert torch.equal(counted.expand_as(wanted), wanted)


@methods
@pytest.mark.parametrize("changed", [1, 13, 24, 39])
def test_later_tokens_change_nothing_before(method, changed):
    """Outputs before the group of queries that a token is in are the same to the bit whatever it is."""
    chosen = policy(method, "sparse")
    ahead = chosen.lookahead(40)
    same = changed // ahead * ahead
    before = chosen.attend(*inputs(40), PROMPT).out
    other = [
        torch.cat([x[:, :, :changed], y[:, :, changed:]], 2)
        for x, y in zip(inputs(40), inputs(40, seed=1), strict=True)
    ]
    after = chosen.attend(*other, PROMPT).out
    torch.testing.assert_close(before[:, :, :same], after[:, :, :same], atol=1e-6, rtol=1e-6)
    # What later keys and values hold is read by nobody before, even where the choice looks ahead at queries.
    assert not torch.allclose(before[:, :, changed:], after[:, :, changed:])


@methods
def test_later_values_are_never_read(method):
    query, key, value = inputs(40)
    chosen = policy(method, "sparse")
    before = chosen.attend(query, key, value, PROMPT).out
    after = chosen.attend(query, key, torch.cat([value[:, :, :25], value[:, :, 25:] + 9], 2), PROMPT).out
    torch.testing.assert_close(before[:, :, :25], after[:, :, :25], atol=1e-6, rtol=1e-6)


@methods
def test_batch_equals_singles_and_grouped_equals_repeated(method):
    query, key, value = inputs(40, batch=3)
    chosen = policy(method, "sparse")
    together = chosen.attend(query, key, value, PROMPT)
    for row in range(3):
        alone = chosen.attend(query[row : row + 1], key[row : row + 1], value[row : row + 1], PROMPT)
        torch.testing.assert_close(together.out[row : row + 1], alone.out, atol=1e-5, rtol=1e-5)
    wide = chosen.attend(query, *(x.repeat_interleave(2, 1) for x in (key, value)), PROMPT)
    torch.testing.assert_close(wide.out, together.out, atol=1e-5, rtol=1e-5)


@methods
def test_deterministic_and_contiguity_does_not_matter(method):
    query, key, value = inputs(40)
    chosen = policy(method, "sparse")
    once = chosen.attend(query, key, value, PROMPT)
    again = chosen.attend(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)), PROMPT)
    assert torch.equal(once.kept, again.kept)
    torch.testing.assert_close(once.out, again.out, atol=1e-6, rtol=1e-6)


@methods
@pytest.mark.parametrize("options", [{"window": 9}, {"softcap": 2.0}, {"window": 12, "softcap": 1.0}])
def test_window_and_softcap_of_the_model_hold(method, options):
    query, key, value = inputs(40)
    prompt = Prompt(layer=0, scale=0.5, **options)
    done = policy(method, "full").attend(query, key, value, prompt)
    torch.testing.assert_close(done.out, attend_exactly(query, key, value, prompt).out, atol=1e-5, rtol=1e-5)


@methods
def test_bfloat16(method):
    query, key, value = (x.bfloat16() for x in inputs(40))
    done = policy(method, "full").attend(query, key, value, PROMPT)
    assert done.out.dtype == torch.bfloat16
    exact = attend_exactly(*(x.float() for x in (query, key, value)), PROMPT).out
    torch.testing.assert_close(done.out.float(), exact, atol=3e-2, rtol=3e-2)


@methods
def test_float64_beyond_the_range_of_float32_is_finite(method):
    query, key, value = (x.double() for x in inputs(40))
    chosen = policy(method, "full")
    out, wide = (chosen.attend(query, key, value * factor, PROMPT).out for factor in (1, 1e200))
    torch.testing.assert_close(wide * 1e-200, out, atol=1e-5, rtol=1e-5)


@methods
@pytest.mark.parametrize("which", ["full", "sparse"])
def test_json_round_trip(method, which):
    chosen = policy(method, which, layers=[1])
    data = json.loads(json.dumps(to_json(chosen)))
    assert data["method"] == method
    assert from_json(data) == chosen


@methods
def test_what_does_not_fit_is_refused(method):
    query, key, value = inputs(40)
    chosen = policy(method, "sparse")
    with pytest.raises(InputError, match="query, key and value must be finite"):
        chosen.attend(torch.where(torch.arange(40)[:, None] == 7, torch.nan, query), key, value, PROMPT)
    with pytest.raises(InputError, match=r"query must be at most as long as key \(39\)"):
        chosen.attend(query, key[:, :, 1:], value[:, :, 1:], PROMPT)
    with pytest.raises(InputError, match="query must have a multiple of 2 heads"):
        chosen.attend(query[:, :3], key, value, PROMPT)


@methods
def test_empty_batch_is_empty(method):
    query, key, value = inputs(40, batch=2)
    done = policy(method, "sparse").attend(query[:0], key[:0], value[:0], PROMPT)
    assert done.out.shape == (0, 4, 40, 8)
