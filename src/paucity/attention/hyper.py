"""HyperAttention: exact among queries and keys that hash alike, sampled elsewhere; near-linear in the length.

Paper: Han et al. 2023 (HyperAttention), https://arxiv.org/abs/2310.05869, Algorithms 1, 3 and 4, Sec. 4.

Unmasked attention of queries to ``n`` keys: both are hashed by hyperplanes and sorted by the Gray order of their
buckets (sortLSH); query ``i`` computes its block of the diagonal of the sorted matrix exactly, and of the other keys
estimates ``sum_j exp(l_ij) v_j`` and ``sum_j exp(l_ij)`` from ``m`` keys drawn uniformly, ``S``:

    sum_{j not in block(i)} f(j)  ~  n / m * sum_{s in S, s not in block(i)} f(s)

which is unbiased; as a logsumexp, ``log(n / m)`` is added to that of the sampled part, and the two parts are merged by
their logsumexps. The causal matrix is cut into halves: the lower left quarter is unmasked attention, the two on the
diagonal are cut again; what has few keys is computed exactly.

As in the published code: uniform samples (the paper's Algorithm 2 draws by the norms of the values), one set of planes
and one of samples for all heads, log(n / m) with all ``n`` keys, exact below the same length. Differs from it: samples
are drawn without replacement (same expectation, less variance, exact at ``m = n``); buckets are in the Gray order that
the paper asks for (the code applies the Gray code to the bucket, not its inverse, so that neighbours may differ in
several planes); samples in a query's own block are left out on every device; a last short block is short, not padded.
Halves are those of the text, so that a prompt on a cache has the lower rows of what the whole text would have. In a
layer with a sliding window, segments as long as the window are causal HyperAttention, and what a query sees before its
segment is exact.

Not attention over a pattern: samples weigh more than other keys, so that there are no parts, and no recall, to tell.
"""

import math
import time
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from ..checks import fail
from ..kernels.attention import Pattern, merge_attention, sparse_attention
from ..ops.formats.block import BlockMask
from ..ops.formats.stripes import KeyLists, Window
from ..ops.hashing import gray_rank, hyperplane_codes, random_hyperplanes
from .compute import Attended, attend_exactly
from .policy import PrefillPolicy
from .prompt import Prompt

Partial = tuple[Tensor, Tensor]
"""Out ``[B, H, T, Dv]`` and logsumexp ``[B, H, T]`` over some of the keys."""


class Hyper(PrefillPolicy):
    """Options of ``hyper``; ``q_block`` sorted keys, or fewer, are a block of the diagonal.

    Attributes:
        exact_length: causal parts of at most this many tokens are exact, and unmasked ones over fewer keys.
        num_samples: keys drawn for an unmasked part; those in a query's own block are left out for it.
        num_planes: hyperplanes of the hash.
        seed: of planes and samples; every layer has its own.
    """

    q_block: int = Field(256, ge=1)
    exact_length: int = Field(4096, ge=1)
    num_samples: int = Field(256, ge=1)
    num_planes: int = Field(7, ge=1, le=30)
    seed: int = Field(0, ge=0, lt=2**31)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> Pattern:
        """The pattern of a text that is computed exactly.

        Raises:
            InputError: if it is not; then `attend` computes something else than a pattern.
        """
        if not self._is_exact(key.shape[2], prompt):
            raise fail("hyper", "select", f"be asked for at most {self.exact_length} keys", key.shape[2])
        return Window(max(1, key.shape[2]))

    def compute(self, query: Tensor, key: Tensor, value: Tensor, prompt: Prompt) -> Attended:
        """Causal HyperAttention; exact where the text or the sliding window is short."""
        keys, before = key.shape[2], key.shape[2] - query.shape[2]
        if self._is_exact(keys, prompt):
            return attend_exactly(query, key, value, prompt)
        run = _Run(self, prompt, query.shape[-1], query.device)
        if prompt.window is None or prompt.window >= keys:
            out, _ = run.causal(query, key, value)
        else:
            segments = [
                run.causal(query[:, :, start - before : stop - before], key[:, :, start:stop], value[:, :, start:stop])
                for start, stop in _spans(before, keys, prompt.window)
            ]
            own = torch.cat([out for out, _ in segments], 2), torch.cat([lse for _, lse in segments], 2)
            out, _ = merge(own, run.before_segments(query, key, value, prompt.window))
        return Attended(out, torch.tensor([[run.kept]], device=out.device), None, run.seconds)

    def lookahead(self, length: int) -> int:
        """All of the text: queries of a half are sorted together; the first half ignores the second (no window)."""
        return 1 if length <= self.exact_length else length

    def _is_exact(self, keys: int, prompt: Prompt) -> bool:
        return min(keys, prompt.window or keys) <= self.exact_length


def hyper_attention(
    query: Tensor, key: Tensor, value: Tensor, *, policy: Hyper | None = None, prompt: Prompt | None = None
) -> Partial:
    """Attention without a causal mask, as `Hyper` computes the lower left quarter of a causal one.

    Args:
        query: ``[B, H, Tq, D]``, at least one and no more than keys.
        key: ``[B, H_kv, Tk, D]``.
        value: ``[B, H_kv, Tk, Dv]``.
        policy: the options; those of the paper by default.
        prompt: scale (``1 / sqrt(D)`` without a prompt), softcap and layer; the window is not looked at.

    Returns:
        Out ``[B, H, Tq, Dv]`` and the estimated logsumexp ``[B, H, Tq]``.

    Raises:
        InputError: if shapes do not fit each other.
    """
    prompt = Prompt(scale=query.shape[-1] ** -0.5) if prompt is None else prompt
    return _Run(policy or Hyper(), prompt, query.shape[-1], query.device).unmasked(query, key, value)


def merge(one: Partial, other: Partial) -> Partial:
    """Both parts, over disjoint keys, as one."""
    return merge_attention([one[0], other[0]], [one[1], other[1]])


@dataclass
class _Run:
    """One prompt in one layer: what is drawn for it, and what it has cost."""

    policy: Hyper
    prompt: Prompt
    dim: int
    device: torch.device
    kept: int = 0
    seconds: float = 0.0
    generator: torch.Generator = field(init=False)
    planes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed((self.policy.seed * 1_000_003 + self.prompt.layer) % 2**32)
        number = self.policy.num_planes
        self.planes = random_hyperplanes(self.dim, number, generator=self.generator, device=self.device)

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """The queries are the last ones of the keys."""
        queries, keys = query.shape[2], key.shape[2]
        if keys <= self.policy.exact_length:
            return self._attend(query, key, value, Window(keys), queries * (2 * keys - queries + 1) // 2, causal=True)
        half = (keys + 1) // 2
        split = max(0, queries - (keys - half))
        first = [self.causal(query[:, :, :split], key[:, :, :half], value[:, :, :half])] if split else []
        query = query[:, :, split:]
        second = self.causal(query, key[:, :, half:], value[:, :, half:])
        both = [*first, merge(second, self.unmasked(query, key[:, :, :half], value[:, :, :half]))]
        return torch.cat([out for out, _ in both], 2), torch.cat([lse for _, lse in both], 2)

    def unmasked(self, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """All queries to all keys."""
        queries, keys = query.shape[2], key.shape[2]
        if keys < self.policy.exact_length or keys <= self.policy.q_block:
            whole = BlockMask.causal(queries, keys, q_block=queries, k_block=keys, device=self.device)
            return self._attend(query, key, value, whole, queries * keys)
        started = time.perf_counter()
        order, key_order = self._order(query), self._order(key)
        diagonal, samples = self._patterns(queries, keys)
        query, key, value = _take(query, order), _take(key, key_order), _take(value, key_order)
        self.seconds += time.perf_counter() - started
        out, lse = self._attend(query, key, value, diagonal, int(diagonal.kept_pairs(queries, keys, causal=False)))
        rows = torch.full_like(samples.counts, samples.q_block)
        rows[..., -1] = queries - samples.q_block * (rows.shape[-1] - 1)
        sampled, its_lse = self._attend(query, key, value, samples, int((samples.counts * rows).sum()))
        weight = math.log(keys / min(self.policy.num_samples, keys))
        out, lse = merge((out, lse), (sampled, its_lse + weight))
        back = torch.empty_like(order).scatter_(-1, order, torch.arange(queries, device=self.device).expand_as(order))
        return _take(out, back), lse.gather(-1, back)

    def before_segments(self, query: Tensor, key: Tensor, value: Tensor, window: int) -> Partial:
        """What the queries of a segment as long as the sliding window see before it."""
        queries, keys = query.shape[2], key.shape[2]
        starts = torch.arange(keys - queries, keys, window, device=self.device)
        at = starts.unsqueeze(-1) + torch.arange(-window, 0, device=self.device)
        lists = KeyLists(at.clamp(min=-1).int()[None, None], (at >= 0).sum(-1)[None, None], window)
        pairs = int(lists.kept_pairs(queries, keys, window=window))
        return self._attend(query, key, value, lists, pairs, causal=True, window=window)

    def _order(self, x: Tensor) -> Tensor:
        """Positions ``[B, heads, T]`` in the Gray order of their buckets, in one bucket as in the text."""
        return gray_rank(hyperplane_codes(x, self.planes)).sort(dim=-1, stable=True).indices

    def _patterns(self, queries: int, keys: int) -> tuple[BlockMask, KeyLists]:
        """The diagonal of the sorted matrix, and the samples beside it: both the same for all heads."""
        count = -(-keys // self.policy.q_block)
        q_block, k_block = -(-queries // count), -(-keys // count)
        shape = -(-queries // q_block), -(-keys // k_block)
        mine = torch.arange(shape[0], device=self.device) * shape[1] // shape[0]
        blocks = torch.arange(shape[1], device=self.device) == mine.unsqueeze(-1)
        drawn = torch.randperm(keys, generator=self.generator)[: self.policy.num_samples].sort().values.to(self.device)
        beside = torch.zeros(shape[0], keys, dtype=torch.bool, device=self.device)
        beside[:, drawn] = drawn // k_block != mine.unsqueeze(-1)
        lists = KeyLists.from_mask(beside[None, None], q_block=q_block)
        return BlockMask(blocks[None, None], q_block, k_block, queries, keys), lists

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        pairs: int,
        *,
        causal: bool = False,
        window: int | None = None,
    ) -> Partial:
        self.kept += pairs
        return sparse_attention(
            query,
            key,
            value,
            pattern,
            scale=self.prompt.scale,
            softcap=self.prompt.softcap,
            window=window,
            causal=causal,
            return_lse=True,
        )


def _spans(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Rows of ``x`` ``[B, H, T, D]`` in ``order`` ``[B, H, T]``."""
    batch, heads = (torch.arange(size, device=x.device) for size in x.shape[:2])
    return x[batch.view(-1, 1, 1), heads.view(-1, 1), order]
