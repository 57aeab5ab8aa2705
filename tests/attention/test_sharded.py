"""The choice of sharded, by loops; the heads together see everything."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import PerHead, Prompt, Sharded
from paucity.checks import InputError


def elements(policy, tq, tk, heads=4, **prompt):
    mask = policy.select(torch.zeros(1, heads, tq, 4), torch.zeros(1, 2, tk, 4), Prompt(**prompt))
    return mask.to_dense(causal=True)[0, :, mask.q_len - tq :]


@pytest.mark.parametrize(("tq", "tk", "dropped"), [(1, 1, 0), (63, 63, 0), (17, 130, 0), (90, 97, 22)])
@pytest.mark.parametrize(("block", "local", "stride", "share", "offset"), [(4, 2, 4, 1, 0), (3, 1, 2, 2, 1)])
def test_near_blocks_and_the_shard_of_the_head(tq, tk, dropped, block, local, stride, share, offset):
    def keeps(h, i, j):
        strided = (j // block + h // share + offset) % stride == 0
        return j <= i and (i // block - j // block < local or strided)

    end = tk + dropped
    expected = [[[keeps(h, i, j) for j in range(dropped, end)] for i in range(end - tq, end)] for h in range(4)]
    policy = Sharded(local_blocks=local, vert_stride=stride, heads_per_shard=share, offset=offset, q_block=block)
    assert torch.equal(elements(policy, tq, tk, dropped=dropped), torch.tensor(expected))


@pytest.mark.parametrize("length", [1, 5, 64, 203])
@pytest.mark.parametrize(("heads", "share", "stride"), [(4, 1, 4), (4, 1, 3), (8, 2, 4), (6, 1, 1)])
def test_the_union_over_heads_is_the_whole_context(length, heads, share, stride):
    policy = Sharded(local_blocks=1, vert_stride=stride, heads_per_shard=share, q_block=4)
    policy.check_model([0], heads, heads)
    assert torch.equal(elements(policy, length, length, heads).any(0), torch.ones(length, length).bool().tril())


def test_the_shard_is_that_of_the_head_in_the_layer():
    query, key, value = (torch.randn(1, h, 60, 8) for h in (4, 2, 2))
    policy, prompt = Sharded(local_blocks=1, vert_stride=4, q_block=4), Prompt(scale=0.3)
    whole = policy.attend(query, key, value, prompt)
    part = policy.attend(query[:, 2:], key[:, 1:], value[:, 1:], replace(prompt, heads=(2, 3), num_heads=4))
    torch.testing.assert_close(part.out, whole.out[:, 2:])
    mixed = PerHead(choices=[Sharded(q_block=64, vert_stride=1), policy], assignment=[[0, 0, 1, 1]])
    torch.testing.assert_close(mixed.attend(query, key, value, prompt).out[:, 2:], whole.out[:, 2:])


def test_homogeneous_heads_see_the_same():
    same = elements(Sharded(local_blocks=1, vert_stride=4, q_block=4, homogeneous=True, offset=3), 60, 60)
    third = elements(Sharded(local_blocks=1, vert_stride=4, q_block=4), 60, 60)[3]
    assert torch.equal(same, third[None])


def test_too_few_shards_are_refused():
    with pytest.raises(InputError, match="vert_stride must be at most 2, the shards that 4 heads have, got 3"):
        Sharded(vert_stride=3, heads_per_shard=2).check_model([0], 4, 2)
    Sharded(vert_stride=8, homogeneous=True).check_model([0], 4, 2)


@pytest.mark.parametrize("options", [{"local_blocks": 0}, {"vert_stride": 0}, {"heads_per_shard": 0}, {"offset": -1}])
def test_bad_options(options):
    with pytest.raises(ValidationError):
        Sharded(**options)
