"""Older entries of a cache in few bits, brought back a part at a time to be read.

Paper: Liu et al. 2024 (KIVI), https://arxiv.org/abs/2402.02750, Sec. 3: keys have outliers in some channels, so each
channel of a group of tokens has its own scale; values have none, so each token's does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.attention.merge import merge_attention
from ...kernels.decode import decode_attention
from ...ops.quantise import dequantise, quantise
from ..prompt import Prompt

_AT_ONCE = 2**22
"""Numbers of the keys that are brought back at a time."""


@dataclass
class Packed:
    """The first entries of lists, in ``N`` groups of ``G`` entries; each list has groups of its own.

    Attributes:
        bits: of a number, 4 or 8.
        parts: tensors ``[N, ...]``: codes, low and step of the keys, then of the values, then positions ``[N, G]``.
        extras: further figures of the entries, ``[N, G]``, by name.
        starts: ``[B, H_kv]`` int64, the first group of each list.
        lengths: ``[B, H_kv]`` int64, entries of each, a multiple of ``G``.
    """

    bits: int
    parts: tuple[Tensor, ...]
    extras: dict[str, Tensor]
    starts: Tensor
    lengths: Tensor

    @classmethod
    def of(
        cls, keys: Tensor, values: Tensor, positions: Tensor, extras: dict[str, Tensor], lengths: Tensor, bits: int
    ) -> "Packed":
        """Pack groups ``[N, G, D]``, ``[N, G, Dv]``, ``[N, G]`` and so on, list by list."""
        groups, size, dim = values.shape
        width = 32 if dim % 32 == 0 else dim
        found = quantise(values.view(groups, size, dim // width, width), -1, bits)
        parts = (*quantise(keys, 1, bits), *found, positions)
        counts = lengths // size
        starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
        return cls(bits, parts, extras, starts, lengths)

    @property
    def group_size(self) -> int:
        """Entries of a group."""
        return self.parts[0].shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        tensors = (*self.parts, *self.extras.values(), self.starts, self.lengths)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def entries(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``groups`` ``[...]``, ``[..., G, D]`` and ``[..., G, Dv]``."""
        keys, low, step, values, value_low, value_step = (part[groups] for part in self.parts[:6])
        return (
            dequantise(keys, low, step, self.bits),
            dequantise(values, value_low, value_step, self.bits).flatten(-2),
        )

    def select_rows(self, rows: Tensor) -> "Packed":
        """Rows of the batch by index."""
        lengths = self.lengths[rows]
        counts = (lengths // self.group_size).flatten()
        starts = counts.cumsum(0) - counts
        source = (self.starts[rows].flatten() - starts).repeat_interleave(counts)
        source = source + torch.arange(len(source), device=source.device)
        extras = {name: extra[source] for name, extra in self.extras.items()}
        return Packed(self.bits, tuple(x[source] for x in self.parts), extras, starts.view_as(lengths), lengths)

    def attend(self, query: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Attention ``[B, H, Tq, Dv]`` of later tokens over all entries, with its lse ``[B, H, Tq]``."""
        batch, heads, queries, dim = query.shape
        size, counts = self.group_size, self.lengths // self.group_size
        most = int(counts.max()) if counts.numel() else 0
        each = max(1, _AT_ONCE // max(1, counts.numel() * size * dim))
        # All queries see all entries: each is a head of its own with one token.
        rows, done = query.reshape(batch, heads * queries, 1, dim), []
        for begin in range(0, most, each):
            number = torch.arange(begin, min(begin + each, most), device=query.device)
            inside = number < counts.unsqueeze(-1)
            key, value = self.entries((self.starts.unsqueeze(-1) + number).where(inside, 0))
            lengths = inside.sum(-1) * size
            done.append(
                decode_attention(
                    rows,
                    key.flatten(2, 3).to(query.dtype),
                    value.flatten(2, 3).to(query.dtype),
                    lengths=lengths,
                    scale=prompt.scale,
                    softcap=prompt.softcap,
                    return_lse=True,
                )
            )
        if not done:
            return query.new_zeros(batch, heads, queries, dim), query.new_full(query.shape[:3], -torch.inf)
        out, lse = merge_attention([out for out, _ in done], [lse for _, lse in done])
        return out.view(batch, heads, queries, -1), lse.view(batch, heads, queries)
