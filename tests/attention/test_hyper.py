"""hyper against the paper by loops, its estimator, its structure, and its options."""

import math

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import Hyper, Prompt
from paucity.attention.compute import attend_exactly
from paucity.attention.hyper import _Run, hyper_attention
from paucity.checks import InputError


def inputs(tq, tk, heads=4, kv=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, t, 8, generator=generator) for h, t in ((heads, tq), (kv, tk), (kv, tk))]


class Loops:
    """Algorithms 1, 3 and 4 with plain sums of exponentials, drawing as the policy draws."""

    def __init__(self, policy, prompt, query, key, value):
        self.run = _Run(policy, prompt, query.shape[-1], query.device)  # the generator and the planes
        self.policy, self.prompt = policy, prompt
        self.query, self.value = query.double(), value.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
        self.key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
        self.top = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
        self.bottom = torch.zeros(*query.shape[:3], dtype=torch.float64)
        self.pairs = 0

    def add(self, b, h, i, j, weight=1.0):
        logit = float(self.query[b, h, i] @ self.key[b, h, j]) * self.prompt.scale
        if self.prompt.softcap:
            logit = math.tanh(logit / self.prompt.softcap) * self.prompt.softcap
        self.bottom[b, h, i] += weight * math.exp(logit)
        self.top[b, h, i] += weight * math.exp(logit) * self.value[b, h, j]
        self.pairs += 1

    def bucket(self, x):
        bits = [int(float(x @ self.run.planes[:, i].double()) > 0) for i in range(self.policy.num_planes)]
        code = sum(bit << i for i, bit in enumerate(bits))
        return next(rank for rank in range(2 ** len(bits)) if rank ^ (rank >> 1) == code)

    def causal(self, before, start, stop):
        """Rows and columns ``start`` to ``stop`` of the causal matrix; queries from ``before`` on exist."""
        heads = [(b, h) for b in range(2) for h in range(self.query.shape[1])]
        rows = range(max(start, before), stop)
        if stop - start <= self.policy.exact_length:
            for b, h in heads:
                for i in rows:
                    for j in range(start, i + 1):
                        self.add(b, h, i - before, j)
            return
        half = start + (stop - start + 1) // 2
        if before < half:
            self.causal(before, start, half)
        self.causal(before, half, stop)
        self.unmasked(heads, [i - before for i in rows if i >= half], list(range(start, half)))

    def unmasked(self, heads, rows, columns):
        n, size = len(columns), self.policy.q_block
        if n < self.policy.exact_length or n <= size:
            for b, h in heads:
                for i in rows:
                    for j in columns:
                        self.add(b, h, i, j)
            return
        count = -(-n // size)
        q_size, k_size = -(-len(rows) // count), -(-n // count)
        q_count, k_count = -(-len(rows) // q_size), -(-n // k_size)
        samples = torch.randperm(n, generator=self.run.generator)[: self.policy.num_samples].tolist()
        for b, h in heads:
            by_row = sorted(rows, key=lambda i, b=b, h=h: self.bucket(self.query[b, h, i]))
            by_column = sorted(columns, key=lambda j, b=b, h=h: self.bucket(self.key[b, h, j]))
            for place, i in enumerate(by_row):
                block = place // q_size * k_count // q_count
                for j in by_column[block * k_size : (block + 1) * k_size]:
                    self.add(b, h, i, j)
                for sample in samples:
                    if sample // k_size != block:
                        self.add(b, h, i, by_column[sample], weight=n / len(samples))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("tq", "tk"), [(37, 37), (11, 45), (30, 41), (1, 33)])
def test_the_paper_by_loops(tq, tk, seed):
    query, key, value = inputs(tq, tk, seed=seed)
    policy = Hyper(exact_length=6, q_block=4, num_samples=3, num_planes=3, seed=seed)
    prompt = Prompt(layer=2, scale=0.4, softcap=3.0 if seed == 2 else None)
    loops = Loops(policy, prompt, query, key, value)
    loops.causal(tk - tq, 0, tk)
    done = policy.attend(query, key, value, prompt)
    torch.testing.assert_close(done.out.double(), loops.top / loops.bottom.unsqueeze(-1), atol=1e-5, rtol=1e-4)
    assert done.kept.tolist() == [[loops.pairs // 8]]
    assert done.parts is None


@pytest.mark.parametrize(("tq", "tk", "size", "samples"), [(33, 64, 8, 5), (64, 64, 16, 64), (7, 50, 9, 4)])
def test_every_query_pays_a_block_and_the_samples_beside_it(tq, tk, size, samples):
    run = _Run(Hyper(exact_length=1, q_block=size, num_samples=samples), Prompt(), 8, torch.device("cpu"))
    diagonal, beside = run._patterns(tq, tk)
    block = diagonal.to_dense()[0, 0]
    assert 0 < block.sum(1).min() <= block.sum(1).max() <= size
    assert beside.counts.max() <= samples
    for row in range(tq):
        mine = beside.positions[0, 0, row // beside.q_block]
        assert not (block[row].nonzero().flatten().unsqueeze(-1) == mine).any()
    if samples >= tk:
        assert (block.sum(1) + beside.counts[0, 0].repeat_interleave(beside.q_block)[:tq] == tk).all()


def test_the_estimate_of_the_sum_is_unbiased():
    query, key, value = inputs(24, 48, heads=2, kv=1)
    exact = ((query * 0.3) @ key.mT).exp().sum(-1)
    draws = [
        hyper_attention(
            *(query, key, value),
            policy=Hyper(exact_length=1, q_block=6, num_samples=5, seed=seed),
            prompt=Prompt(scale=0.3),
        )[1].exp()
        for seed in range(200)
    ]
    mean = torch.stack(draws).mean(0) / exact
    assert mean.mean() == pytest.approx(1.0, abs=0.02)
    assert (mean - 1).abs().max() < 0.2
    with pytest.raises(InputError, match="query must be at most as long as key"):
        hyper_attention(key, query[:, :1], query[:, :1], policy=Hyper(exact_length=1))


def test_all_samples_are_dense_and_the_first_half_ignores_the_second():
    query, key, value = inputs(50, 50)
    every = Hyper(exact_length=4, q_block=3, num_samples=50).attend(query, key, value, Prompt(scale=0.5))
    torch.testing.assert_close(every.out, attend_exactly(query, key, value, Prompt(scale=0.5)).out)
    assert every.kept.item() == 50 * 51 // 2
    policy = Hyper(exact_length=4, q_block=3, num_samples=2)
    before = policy.attend(query, key, value, Prompt(scale=0.5)).out
    changed = [torch.cat([x[:, :, :25], x[:, :, 25:] + 1], 2) for x in (query, key, value)]
    after = policy.attend(*changed, Prompt(scale=0.5)).out
    torch.testing.assert_close(before[:, :, :25], after[:, :, :25])
    assert not torch.allclose(before[:, :, 25:], after[:, :, 25:])


@pytest.mark.parametrize("window", [3, 9, 16, 40, 100])
@pytest.mark.parametrize(("tq", "tk"), [(41, 41), (20, 41)])
def test_nothing_is_read_beyond_the_sliding_window(tq, tk, window):
    query, key, value = inputs(tq, tk)
    policy, prompt = Hyper(exact_length=4, q_block=2, num_samples=2), Prompt(scale=0.5, window=window)
    done = policy.attend(query, key, value, prompt)
    probe = torch.eye(tk).expand(2, 2, tk, tk)  # values that tell who was read
    read = policy.attend(query, key, probe, prompt).out > 0
    place = torch.arange(tk)
    near = (place <= place[tk - tq :, None]) & (place > place[tk - tq :, None] - window)
    assert not (read & ~near).any()
    assert done.kept.item() == read[0, 0].sum()
    if window in (9, 16):
        assert done.kept.item() < near.sum()


def test_layers_and_seeds_draw_apart():
    query, key, value = inputs(40, 40)
    outs = [
        Hyper(exact_length=4, q_block=2, num_samples=2, seed=seed).attend(query, key, value, Prompt(layer=layer)).out
        for seed, layer in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[3])


def test_gradients_flow():
    query, key, value = (x.double().requires_grad_() for x in inputs(14, 14, heads=2, kv=1))
    policy = Hyper(exact_length=3, q_block=2, num_samples=2)
    done = torch.autograd.gradcheck(
        lambda *x: policy.attend(*x, Prompt(scale=0.5)).out, (query, key, value), fast_mode=True
    )
    assert done


def test_bad_options():
    for options in ({"num_samples": 0}, {"q_block": 0}, {"exact_length": 0}, {"num_planes": 0}, {"samples": 4}):
        with pytest.raises(ValidationError):
            Hyper(**options)
    query, key, _ = inputs(9, 9)
    with pytest.raises(InputError, match="hyper: select must be asked for at most 4 keys, got 9"):
        Hyper(exact_length=4).select(query, key, Prompt())
