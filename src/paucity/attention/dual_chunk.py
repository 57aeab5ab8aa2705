"""Dual-chunk attention: a text longer than a model was trained on, in distances that it was trained on.

Papers: An et al. 2024 (Dual Chunk Attention), https://arxiv.org/abs/2402.17463, Sec. 3; Yang et al. 2025 (Qwen2.5-1M),
https://arxiv.org/abs/2501.15383, Sec. 5.1 (extrapolation) and 5.2 (sparse attention with it), for the defaults.

With ``c`` = `chunk_size` (at most the trained length), ``w`` = `local_size` and chunks of ``s = c - w`` keys, key ``j``
stands at ``j mod s`` and query ``i`` at ``i mod s`` for keys of its own chunk, at ``min(s + i mod s, c - 1)`` for the
chunk before, and at ``c - 1`` for all earlier ones. So keys in order stay in order within a chunk, the nearest ``w``
keep their true distance, and no distance reaches ``c``. Where ``w <= s`` the three are one: for the keys of chunk
``m``, query ``i`` acts as if it stood at ``min(i, m s + c - 1)``. Keys stay as the cache has them; queries are turned
once for each chunk of keys, and the parts are merged by their logsumexp.

The logits are scaled by ``(0.1 ln(L / L0) + 1)**2`` for a text of ``L > L0`` tokens (`original_length`), which is
YaRN's temperature as the report and its code have it: both query and key carry the root.

Sparse selection is `paucity.attention.vertical_slash`, by the last queries of each ``prefill_chunk`` of the text. As in
the report, it is made with continuous positions, in which a slash stays a slash: chunks before the last two are put so
that the query stands at ``c + i mod s`` and not, for all ``i``, at ``c - 1``.

Differences: the code of both papers puts far queries at ``c``, one more than the text of the first says. The report's
code (vLLM) chooses anew at every chunk of keys; with `prefill_chunk` equal to ``s`` that is so here. Decode steps read
all keys. A layer with a sliding window of at most ``c`` sees no longer distances, and keeps its positions.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from math import log

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from ..checks import fail
from ..kernels.attention import Pattern, merge_attention, sparse_attention
from ..kernels.lines import line_lists
from ..ops.formats.block import BlockMask
from ..ops.formats.stripes import KeyLists, Window
from .compute import Attended, attend_pattern, kept_pairs, lead_of
from .policy import PrefillPolicy
from .prompt import Prompt
from .rotary import Rotary
from .vertical_slash import VerticalSlash, line_scores


class DualChunk(PrefillPolicy):
    """Options of ``dual_chunk``. Up to `chunk_size` tokens, without sparse selection, it is the dense model.

    Attributes:
        chunk_size: distances stay below this; at most the length that the model was trained on.
        local_size: nearest keys whose distance is always true; at most half of `chunk_size`.
        original_length: texts longer than this get sharper logits; None is never.
        sparse: budgets of the sparse selection, and from how many tokens on it is made (its ``min_length``); its
            ``layers`` and ``q_block`` are not looked at. None reads all keys.
        budget_factors: factors on both budgets, for each layer of the model and each of its query heads, as
            `paucity.attention.refine` finds them.
        prefill_chunk: queries that share a choice of keys.
    """

    chunk_size: int = Field(8192, ge=2)
    local_size: int = Field(1024, ge=1)
    original_length: int | None = Field(None, ge=1)
    sparse: VerticalSlash | None = VerticalSlash(min_length=32768)
    budget_factors: list[list[float]] | None = None
    prefill_chunk: int = Field(32768, ge=1)

    @model_validator(mode="after")
    def _fitting(self) -> "DualChunk":
        if 2 * self.local_size > self.chunk_size:
            raise fail(
                "dual_chunk", "local_size", f"be at most half of chunk_size ({self.chunk_size})", self.local_size
            )
        if self.prefill_chunk % self.q_block:
            raise fail("dual_chunk", "prefill_chunk", f"be a multiple of q_block ({self.q_block})", self.prefill_chunk)
        for row in self.budget_factors or ():
            if self.sparse is None or any(factor <= 0 for factor in row):
                raise fail("dual_chunk", "budget_factors", "be positive, with sparse selection", row)
        return self

    @property
    def stride(self) -> int:
        """Keys in a chunk."""
        return self.chunk_size - self.local_size

    def check_model(self, layers: Sequence[int], num_heads: int, num_kv_heads: int) -> None:
        """Raise InputError unless there is a budget factor for every head of every layer, where there are any."""
        factors = self.budget_factors
        if factors is not None and [len(row) for row in factors] != [num_heads] * (max(layers) + 1):
            wanted = f"have {max(layers) + 1} layers of {num_heads} heads"
            raise fail("dual_chunk", "budget_factors", wanted, [len(row) for row in factors])

    @property
    def decodes(self) -> bool:
        """True: further tokens, too, must not meet a distance beyond ``chunk_size``."""
        return True

    def lookahead(self, length: int) -> int:
        """The queries that share a choice; all where the scale of the logits depends on the length of the text."""
        if self.original_length is not None and length > self.original_length:
            return length
        return 1 if self.sparse is None or length < self.sparse.min_length else self.prefill_chunk

    def logit_scale(self, length: int) -> float:
        """Factor on the logits of a text of ``length`` tokens."""
        if self.original_length is None or length <= self.original_length:
            return 1.0
        return (0.1 * log(length / self.original_length) + 1) ** 2

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> Pattern:
        """The keys read: all of them, or lines chosen with continuous positions, anew for each ``prefill_chunk``.

        Raises:
            InputError: if positions must change and the rotary embedding is not known.
        """
        queries, keys = query.shape[2], key.shape[2]
        if self.sparse is None or queries == 1 or keys + prompt.dropped < self.sparse.min_length:
            return Window(max(1, keys), q_block=self.q_block)
        pieces, begin = [], keys - queries
        while begin < keys:
            end = min(keys, (begin // self.prefill_chunk + 1) * self.prefill_chunk)
            mine, seen = query[:, :, begin - keys + queries : end - keys + queries], key[:, :, :end]
            scores = line_scores(mine, self._continuous(seen, prompt), prompt, num_last=self.sparse.num_last_queries)
            vertical, slash = self._lines(self.sparse, *scores, self._factors(query, prompt), prompt.dropped)
            pieces.append(line_lists(vertical, slash, num_queries=end - begin, q_block=self.q_block))
            begin = end
        return _joined(pieces)

    def compute(self, query: Tensor, key: Tensor, value: Tensor, prompt: Prompt) -> Attended:
        """Attention over what `select` chooses, with the distances of the three kinds of chunks."""
        prompt = replace(prompt, scale=prompt.scale * self.logit_scale(key.shape[2] + prompt.dropped))
        started = time.perf_counter()
        pattern = self.select(query, key, prompt)
        seconds = time.perf_counter() - started
        if not self._changes_positions(key, prompt):
            return attend_pattern(query, key, value, pattern, prompt, select_seconds=seconds)
        out, _ = self.attend_chunks(query, key, value, pattern, prompt)
        return Attended(out, kept_pairs(pattern, query.shape[2], key.shape[2], window=prompt.window), None, seconds)

    def attend_chunks(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, prompt: Prompt
    ) -> tuple[Tensor, Tensor]:
        """Attention over a pattern of `select`, chunk of keys by chunk of keys.

        Args:
            query: ``[B, H, Tq, D]`` at true positions, as all that follows.
            key: ``[B, H_kv, Tk, D]``.
            value: ``[B, H_kv, Tk, Dv]``.
            pattern: a `Window` that is everything, or key lists.
            prompt: its scale is used as it is.

        Returns:
            Out ``[B, H, Tq, Dv]`` and the logsumexp of the logits ``[B, H, Tq]``.
        """
        first, keys, changes = key.shape[2] - query.shape[2], key.shape[2], self._changes_positions(key, prompt)
        lead, done = lead_of(pattern, query.shape[2], keys), None
        query = pad(query, (0, 0, lead, 0)) if lead else query
        for start in range(prompt.dropped // self.stride * self.stride, keys + prompt.dropped, self.stride):
            low, high = max(0, start - prompt.dropped), min(keys, start - prompt.dropped + self.stride)
            if prompt.window is not None and high <= first - prompt.window + 1:
                continue
            if isinstance(pattern, KeyLists):
                origin, begin = 0, first - lead
                seen: Pattern = _between(pattern, low, high)
            else:
                origin, begin = low, max(low, first)
                seen = _first_block(keys - begin, keys - low, high - low, self.q_block, query.device)
            mine = query[:, :, begin - first + lead :]
            part = sparse_attention(
                self._at_chunk(mine, begin, start, prompt) if changes else mine,
                key[:, :, origin:],
                value[:, :, origin:],
                seen,
                scale=prompt.scale,
                softcap=prompt.softcap,
                window=prompt.window,
                return_lse=True,
            )
            done = _merged(done, part)
        assert done is not None
        return done[0][:, :, lead:].to(query.dtype), done[1][:, :, lead:]

    def _changes_positions(self, key: Tensor, prompt: Prompt) -> bool:
        longest = key.shape[2] + prompt.dropped
        return (longest if prompt.window is None else min(longest, prompt.window)) > self.chunk_size

    def _at_chunk(self, query: Tensor, begin: int, start: int, prompt: Prompt) -> Tensor:
        """Queries from the key ``begin`` on, where they stand for the keys of the chunk from position ``start`` on."""
        old = torch.arange(begin, begin + query.shape[2], device=query.device) + prompt.dropped
        true = max(0, min(query.shape[2], start + self.chunk_size - prompt.dropped - begin))
        if true == query.shape[2]:
            return query
        new = torch.full_like(old[true:], start + self.chunk_size - 1)
        turned = _rotary(prompt).turn(query[:, :, true:], old[true:], new)
        return torch.cat([query[:, :, :true], turned], dim=2) if true else turned

    def _continuous(self, key: Tensor, prompt: Prompt) -> Tensor:
        """Keys where they stand for the last query: true in its chunk and the one before, the others chunk by chunk."""
        place = torch.arange(key.shape[2], device=key.device) + prompt.dropped
        behind = (prompt.dropped + key.shape[2] - 1) // self.stride - place // self.stride
        far = int((behind >= 2).sum())
        if not far or not self._changes_positions(key, prompt):
            return key
        new = (place + behind * self.stride - self.chunk_size)[:far]
        return torch.cat([_rotary(prompt).turn(key[:, :, :far], place[:far], new), key[:, :, far:]], dim=2)

    def _factors(self, query: Tensor, prompt: Prompt) -> list[float]:
        factors = self.budget_factors
        return [1.0 if factors is None else factors[prompt.layer][head] for head in prompt.head_indices(query)]

    @staticmethod
    def _lines(
        sparse: VerticalSlash, vertical: Tensor, slash: Tensor, factors: Sequence[float], dropped: int
    ) -> tuple[Tensor, Tensor]:
        """The lines kept ``[B, H, Tk]`` each, heads of one factor together."""
        kept = torch.zeros_like(vertical, dtype=torch.bool), torch.zeros_like(slash, dtype=torch.bool)
        for factor in set(factors):
            heads = [head for head, own in enumerate(factors) if own == factor]
            shares = {
                name: min(1.0, share * factor)
                for name in ("vertical_share", "slash_share")
                if (share := getattr(sparse, name)) is not None
            }
            counts = {name: max(1, round(getattr(sparse, name) * factor)) for name in ("num_vertical", "num_slash")}
            scaled = sparse.model_copy(update=counts | shares)
            found = scaled.lines(vertical[:, heads], slash[:, heads], dropped=dropped)
            for whole, mine in zip(kept, found, strict=True):
                whole[:, heads] = mine
        return kept


def _rotary(prompt: Prompt) -> Rotary:
    if prompt.rotary is None:
        raise fail(
            "dual_chunk", "model", "have a rotary embedding of a kind known, to be given other positions", "none"
        )
    return prompt.rotary


def _merged(done: tuple[Tensor, Tensor] | None, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What all queries have so far, with a part that the last of them have; float32 or float64."""
    out, lse = part[0].to(part[1].dtype), part[1]
    if done is None:
        return out, lse
    before = done[1].shape[2] - lse.shape[2]
    merged = merge_attention([done[0][:, :, before:], out], [done[1][:, :, before:], lse])
    if not before:
        return merged
    return torch.cat([done[0][:, :, :before], merged[0]], 2), torch.cat([done[1][:, :, :before], merged[1]], 2)


def _first_block(queries: int, keys: int, size: int, q_block: int, device: torch.device) -> BlockMask:
    """The first ``size`` keys, for all queries."""
    blocks = torch.zeros(1, 1, -(-queries // q_block), -(-keys // size), dtype=torch.bool, device=device)
    blocks[..., 0] = True
    return BlockMask(blocks, q_block, size, queries, keys)


def _between(lists: KeyLists, low: int, high: int) -> KeyLists:
    """The keys from ``low`` up to ``high``."""
    positions = lists.positions
    counts = ((positions >= low) & (positions < high)).sum(-1)
    width = int(counts.max()) if counts.numel() else 0
    rank = torch.arange(width, device=positions.device)
    source = rank + (positions < high).sum(-1, keepdim=True) - width
    kept = positions.gather(-1, source.clamp(min=0)) if width else positions[..., :0]
    return KeyLists(kept.masked_fill_(rank < (width - counts).unsqueeze(-1), -1), counts, lists.q_block)


def _joined(pieces: Sequence[KeyLists]) -> KeyLists:
    """Lists of successive blocks of queries."""
    width = max(piece.positions.shape[-1] for piece in pieces)
    positions = [pad(piece.positions, (width - piece.positions.shape[-1], 0), value=-1) for piece in pieces]
    return KeyLists(torch.cat(positions, 2), torch.cat([piece.counts for piece in pieces], 2), pieces[0].q_block)
