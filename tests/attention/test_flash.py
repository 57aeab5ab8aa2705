"""Flash is the model's own attention: exact, whatever the length and the options of the layer."""

import pytest
import torch

from paucity.attention import Flash, PerHead, Prompt, SinkWindow


def naive(query, key, value, scale, window):
    out = torch.zeros(*query.shape[:3], value.shape[-1])
    first, share = key.shape[2] - query.shape[2], query.shape[1] // key.shape[1]
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        seen = range(max(0, i + first - window + 1), i + first + 1)
        logits = torch.stack([query[b, h, i] @ key[b, h // share, j] * scale for j in seen])
        out[b, h, i] = sum(p * value[b, h // share, j] for p, j in zip(logits.softmax(0), seen, strict=True))
    return out


@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (19, 19), (5, 18)])
@pytest.mark.parametrize("window", [1000, 7])
def test_matches_loops(tq, tk, window):
    query, key, value = torch.randn(2, 4, tq, 8), torch.randn(2, 2, tk, 8), torch.randn(2, 2, tk, 6)
    done = Flash(q_block=4).attend(query, key, value, Prompt(scale=0.3, window=window))
    torch.testing.assert_close(done.out, naive(query, key, value, 0.3, window), atol=1e-5, rtol=1e-5)
    kept = sum(min(i + 1, window) for i in range(tk - tq, tk))
    assert done.kept.tolist() == [[kept]]


def test_heads_that_stay_dense_are_exact():
    query, key, value = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    mixed = PerHead(choices=[Flash(), SinkWindow(num_sinks=1, window_size=3)], assignment=[[0, 1, 1, 0]])
    done = mixed.attend(query, key, value, Prompt(scale=0.3))
    exact = Flash().attend(query, key, value, Prompt(scale=0.3))
    torch.testing.assert_close(done.out[:, [0, 3]], exact.out[:, [0, 3]])
    assert done.kept[0, 0] == 30 * 31 // 2 > done.kept[0, 1]
